"""The embedded model: its files, its card, and that it does on drawn pairs what its card says."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import kcfi
from kcfi.processing import Describer
from kcfi.training.data.pairs import class_ids
from kcfi.training.scoring.metrics import MaskScores, change_accuracy
from kcfi.training.synthetic.dataset import SyntheticDataset

FOLDER = Path(kcfi.embedded_model())


@pytest.fixture(scope="module")
def describer():
    return Describer(AutoModelForImageTextToText.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER))


def test_folder_holds_small_safetensors_a_card_and_no_code():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(sizes.values()) <= 64 * 2**20
    assert {"model.safetensors", "config.json", "processor_config.json", "README.md"} <= set(sizes)
    assert not [name for name in sizes if name.endswith((".py", ".bin", ".pt"))]
    assert "auto_map" not in (FOLDER / "config.json").read_text(encoding="utf-8")


def test_card_states_the_number_of_parameters(describer):
    millions = sum(parameter.numel() for parameter in describer.model.parameters()) / 1e6
    stated = re.search(r"([\d.]+) M parameters", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert stated and float(stated.group(1)) == pytest.approx(millions, abs=0.05)


def test_the_example_of_the_card_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("before.png", "after.png"):
        shutil.copy(Path(kcfi.__file__).parent / "example" / name, name)
    code = re.search(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), re.S)[1]
    exec(compile(code, "README.md", "exec"), {})
    assert "houses" in capsys.readouterr().out
    assert set(np.unique(np.asarray(Image.open("mask.png")))) <= {0, 1, 2}


def test_unseen_drawn_pairs_are_told_apart_and_masked(describer):
    pairs, masks, captions = SyntheticDataset(24, split="test", seed=77), MaskScores("road_building"), []
    for example in (pairs[index] for index in range(len(pairs))):
        report = describer.describe(example["image_before"], example["image_after"])
        masks.update(report.mask, class_ids(example["mask"], "road_building", example["filename"]))
        captions.append(report.caption)
    assert change_accuracy(captions, [index % 2 == 1 for index in range(len(pairs))]) >= 90
    assert masks.compute()["f1"]["change"] >= 80  # below its score on 500 pairs: 24 pairs vary


def test_the_example_pair_has_a_change(describer):
    example = Path(kcfi.__file__).parent / "example"
    before, after = Image.open(example / "before.png"), Image.open(example / "after.png")
    report = describer.describe(before, after)
    assert np.count_nonzero(report.mask) and report.caption
