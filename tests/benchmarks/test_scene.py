import sys

import numpy as np
import pytest
import scene

from kcfi.models import load
from kcfi.processing import Describer


@pytest.mark.parametrize(("side", "changed"), [(768, 1), (1024, 1)])
def test_few_places_of_the_scene_are_changed_ones(side, changed, monkeypatch):
    drawn, draw = [], scene.SyntheticDataset.__getitem__

    def note(pairs, index):
        drawn.append(index)
        return draw(pairs, index)

    monkeypatch.setattr(scene.SyntheticDataset, "__getitem__", note)
    before, after = scene.draw_scene(side)
    assert before.size == after.size == (side, side) and np.asarray(before).std() > 0
    assert len(drawn) == (side // 256) ** 2 and sum(index % 2 for index in drawn) == changed


def test_another_mask_is_refused(detector, monkeypatch):
    monkeypatch.setattr(scene, "build_describer", lambda case: Describer(*load(str(detector)), tile=128))
    monkeypatch.setattr(scene, "plain", lambda describer, images: np.ones((256, 256)))
    monkeypatch.setattr(sys, "argv", ["scene.py", "--cases", "kcfi-tiny", "--sides", "256"])
    with pytest.raises(AssertionError, match="the masks differ"):
        scene.main()


def test_the_large_language_model_stands_behind_the_weights_of_kcfi_tiny(monkeypatch):
    monkeypatch.setattr(scene.describer_kcfi, "LONGEST", 64)  # set back at the end
    small, large = (scene.build_describer(case).model for case in scene.CASES)
    assert large.config.text_config.hidden_size == 576 and scene.describer_kcfi.LONGEST == scene.WORDS
    found = large.state_dict()
    for name, weights in small.state_dict().items():
        if name.split(".")[1] in ("vision_tower", "key_change_perceiver", "change_detection_head"):
            assert (found[name] == weights).all()
