import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kcfi.models import load
from kcfi.training.synthetic.dataset import SyntheticDataset
from kcfi.training.synthetic.material_library import LibraryMaterials

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "false_alarms.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("false_alarms", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("marked", "false"), [(True, 100), (False, 0)])
def test_who_marks_everything_marks_what_stands_and_what_is_unchanged(
    script, monkeypatch, detector, library, marked, false
):
    model, processor = load(str(detector))

    def encode(pixel_values):
        logits = torch.zeros(len(pixel_values), 3, 8, 8)
        logits[:, 2 if marked else 0] = 20.0
        return SimpleNamespace(mask_logits=logits)

    monkeypatch.setattr(model, "get_image_features", encode)
    pairs = SyntheticDataset(8, materials=LibraryMaterials(library), pair_mix={"single_date": 1})
    changed = [(np.asarray(pairs[index]["mask"]) > 0).mean() for index in range(8)]
    assert any(pairs.standing(index).any() for index in range(8)) and any(changed)
    scores = script.measure(model, processor, pairs)
    assert (scores["standing"], scores["unchanged"]) == (false, false)
    share = 100 * sum(changed) / 8
    assert scores["ece"] == pytest.approx(100 - share if marked else share, abs=0.1)
    assert scores["f1"] == (pytest.approx(200 * share / (100 + share), abs=0.1) if marked else 0)


def test_it_prints_the_scores_of_every_kind_of_pairs(library):
    command = [sys.executable, str(SCRIPT), "--num_pairs", "4", "--materials", str(library), "--split", "test"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    drawn, *others = map(json.loads, process.stdout.splitlines())
    assert drawn["pairs"] == "drawn" and drawn["f1"] > 50  # the embedded model
    assert [scores["pairs"] for scores in others] == ["composed", "single_date"]
