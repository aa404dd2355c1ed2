import sys

import numpy as np
import pytest
import speed
from PIL import Image

import kcfi.speed
from kcfi.models import load
from kcfi.processing import describer_kcfi
from kcfi.training.synthetic.dataset import SyntheticDataset


@pytest.fixture
def drawn(monkeypatch):
    """Ten drawn pairs of the side that the tiny model reads, in place of a data set."""
    pairs = SyntheticDataset(10, seed=3)
    small = [{k: v.resize((32, 32)) if isinstance(v, Image.Image) else v for k, v in pair.items()} for pair in pairs]
    monkeypatch.setattr(speed, "load_pairs", lambda dataset, split: small)
    monkeypatch.setattr(describer_kcfi, "LONGEST", 4)
    monkeypatch.setattr(kcfi.speed, "KEPT", kcfi.speed.KEPT)  # the benchmark's own afterwards is gone
    return small


def test_pairs_lie_in_folders_of_eight_with_their_truth(drawn, tmp_path):
    folders = speed.write_folders(tmp_path, "PAIRS", "test", 10)
    assert [len(list((folder / "truth").iterdir())) for folder in folders] == [8, 2]
    assert np.array_equal(speed.read_masks(folders[1], "truth")[1], np.asarray(drawn[9]["mask"]))


def test_f1_counts_building_pixels_alone():
    marked, true = np.array([255, 255, 128, 0]), np.array([255, 0, 255, 128])
    assert speed.f1(marked, true) == pytest.approx(50) and speed.f1(true, true) == 100


def test_the_table_says_what_each_way_costs_and_changes(drawn, detector, monkeypatch, capsys):
    monkeypatch.setattr(speed, "load", lambda name, device: load(str(detector)))
    monkeypatch.setattr(sys, "argv", ["speed.py", "PAIRS", "--num_pairs", "8", "--ways", "plain"])
    speed.main()
    loop, plain = capsys.readouterr().out.splitlines()[-2:]
    assert loop.startswith("| loop | - |") and "| 0 of 8 | 0 of 8192 (0.0000%) |" in plain


def test_what_only_one_way_says_is_another_sentence_and_units_have_a_name():
    seconds, masks = {"plain": [2.0], "bf16": [1.0]}, dict.fromkeys(("plain", "bf16"), np.zeros((2, 2), int))
    sentences = {"plain": {"a": "one", "b": "two"}, "bf16": {"a": "one", "c": "three"}}
    heads, _, _, row = speed.table(seconds, seconds, {"bf16": (1.0, 0.5)}, sentences, masks, "tile", 4).splitlines()
    assert "| ms a tile, clock |" in heads
    assert row == "| bf16 | 1.0 s / 0.5 s | 250 | 250 | 2.00 | 4 / 2 | 2 of 3 | 0 of 4 (0.0000%) | - |"


def test_a_way_pays_after_its_start_and_tells_its_differences():
    seconds = {"plain": [0.8, 0.8], "exact": [0.4, 0.4]}
    masks = {"truth": np.full((1, 2, 2), 255), "plain": np.full((1, 2, 2), 255), "exact": np.zeros((1, 2, 2), int)}
    sentences = {"plain": {"a": "one", "b": "two"}, "exact": {"a": "one", "b": "three"}}
    row = speed.table(seconds, seconds, {"exact": (10.0, 0.5)}, sentences, masks).splitlines()[-1]
    assert row.startswith("| exact | 10.0 s / 0.5 s | 50 | 50 | 2.00 | 200 / 10 | 1 of 2 | 4 of 4 (100.0000%) | 0.0 |")
