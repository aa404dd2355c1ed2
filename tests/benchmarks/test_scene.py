import numpy as np
import pytest
import scene


@pytest.mark.parametrize(("side", "changed"), [(768, 1), (1280, 2)])
def test_few_places_of_the_scene_are_changed_ones(side, changed, monkeypatch):
    drawn, draw = [], scene.SyntheticDataset.__getitem__

    def note(pairs, index):
        drawn.append(index)
        return draw(pairs, index)

    monkeypatch.setattr(scene.SyntheticDataset, "__getitem__", note)
    before, after = scene.draw_scene(side)
    assert before.size == after.size == (side, side) and np.asarray(before).std() > 0
    assert len(drawn) == (side // 256) ** 2 and sum(index % 2 for index in drawn) == changed
