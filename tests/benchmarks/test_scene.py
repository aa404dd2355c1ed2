import sys

import numpy as np
import pytest
import scene
from PIL import Image

import kcfi.speed
from kcfi.models import load
from kcfi.processing import Describer, describer_kcfi


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


@pytest.fixture
def tiny(detector, monkeypatch):
    """The describer of a tiny model."""
    describer = Describer(*load(str(detector)))
    monkeypatch.setattr(describer_kcfi, "LONGEST", 4)
    monkeypatch.setattr(kcfi.speed, "KEPT", kcfi.speed.KEPT)  # the benchmark's own afterwards is gone
    monkeypatch.setattr(scene, "build_describer", lambda case: describer)
    return describer


def test_ways_of_a_scene_are_compared_by_the_tile(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scene.py", "--speed", "plain", "--cases", "kcfi-tiny", "--sides", "256"])
    scene.main()
    title, heads, _, plain = capsys.readouterr().out.splitlines()
    assert title.startswith("kcfi-tiny, 256 px; ") and "ms a tile, clock" in heads and "pays after tiles" in heads
    assert plain.startswith("| plain | 0.0 s / 0.0 s | ") and plain.endswith("| 0 of 65536 (0.0000%) | - |")


def test_sentences_belong_to_the_square_of_their_change(tiny, make_pair, tmp_path):
    dates = [tmp_path / "before.tif", tmp_path / "after.tif"]
    for path, image in zip(dates, make_pair(600, 300, (520, 40, 560, 80)), strict=True):
        image.save(path)
    first = scene.sentences_by_square(tiny, dates, tmp_path / "plain")
    assert list(first) == ["2, 0"] and first["2, 0"]
    marked = scene.read_mask(tmp_path / "plain") > 0
    assert marked[40:80, 520:560].all() and marked.sum() < 2 * 40 * 40
    Image.open(dates[0]).save(dates[1])
    assert scene.sentences_by_square(tiny, dates, tmp_path / "plain") == {}  # not what was kept


@pytest.mark.parametrize("options", [["--speed", "exact"], ["--speed", "plain", "--json"]])
def test_a_table_without_plain_or_as_json_is_refused(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scene.py", *options])
    with pytest.raises(SystemExit):
        scene.main()
    assert "name plain too, and leave --json out" in capsys.readouterr().err


def test_the_large_language_model_stands_behind_the_weights_of_kcfi_tiny(monkeypatch):
    monkeypatch.setattr(scene.describer_kcfi, "LONGEST", 64)  # set back at the end
    small, large = (scene.build_describer(case).model for case in scene.CASES)
    assert large.config.text_config.hidden_size == 576 and scene.describer_kcfi.LONGEST == scene.WORDS
    found = large.state_dict()
    for name, weights in small.state_dict().items():
        if name.split(".")[1] in ("vision_tower", "key_change_perceiver", "change_detection_head"):
            assert (found[name] == weights).all()
