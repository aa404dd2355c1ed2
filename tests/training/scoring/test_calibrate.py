"""Calibration: what is fitted on pairs with known truth, and where it is saved."""

import json
import shutil

import numpy as np
import pytest
import torch

from kcfi.models import load
from kcfi.processing import InputError
from kcfi.processing.calibration_kcfi import Calibration
from kcfi.training.scoring.calibrate import (
    Reliability,
    Sample,
    calibrate,
    fit,
    fit_pairs,
    fit_temperature,
    labelled_logits,
    mask_error,
)
from kcfi.training.synthetic.dataset import SyntheticDataset, SyntheticSettings, write_levir_mci
from kcfi_cli import main


def overconfident(temperature, count=40000, seed=0):
    """A sample whose labels are drawn from its logits divided by `temperature`."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, count, generator=generator) * 4
    labels = torch.multinomial((logits / temperature).softmax(0).T, 1, generator=generator)[:, 0]
    return Sample(logits, labels, logits[:, :200], True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    sample = overconfident(temperature)
    assert fit_temperature([sample], "road_building") == pytest.approx(temperature, rel=0.03)
    assert mask_error([sample], "road_building", temperature) < 0.02
    if temperature == 3:
        assert mask_error([sample], "road_building", 1.0) > 0.1


def test_without_masks_the_temperature_stays_one():
    assert fit_temperature([Sample(torch.zeros(3, 0), torch.zeros(0).long(), torch.zeros(3, 9), True)], "change") == 1


def test_masks_of_buildings_alone_say_nothing_of_roads():
    logits = torch.tensor([[0.0], [9.0], [0.0]])  # surely a road
    both = labelled_logits(logits, "building", 1.0).exp()
    assert both.shape == (2, 1) and both[0].item() > 0.99 and both.sum().item() == pytest.approx(1)
    assert labelled_logits(logits, "road_building", 1.0).shape == (3, 1)
    change = labelled_logits(logits, "change", 1.0).exp()  # a road is a change
    assert change.shape == (2, 1) and change[1].item() > 0.99


def test_the_probability_of_a_pair_is_a_logistic_function_of_its_evidence():
    generator = np.random.default_rng(0)
    evidences = generator.normal(0, 3, 20000)
    changed = generator.random(20000) < 1 / (1 + np.exp(-(0.5 * evidences - 1)))
    slope, intercept = fit_pairs(evidences, changed)
    assert (slope, intercept) == (pytest.approx(0.5, abs=0.03), pytest.approx(-1, abs=0.06))
    with pytest.raises(InputError, match="no surer of changed pairs"):
        fit_pairs(evidences, ~changed)
    with pytest.raises(InputError, match="only one kind"):
        fit_pairs(evidences[:3], np.ones(3, bool))


def test_reliability_counts_claims_against_truth():
    counts = Reliability()
    counts.update(np.array([0.95, 0.95, 0.05, 1.0]), np.array([True, False, False, True]))
    assert counts.count[9] == 3 and counts.true[9] == 2
    assert counts.error == pytest.approx((0.9 + 0.05) / 4)


def test_unchanged_pairs_of_both_splits_are_kept_for_alarm_rates():
    def sample(odds, changed):
        logits = torch.zeros(2, 120)
        logits[1] = odds
        return Sample(logits[:, :0], torch.zeros(0).long(), logits, changed)

    fitted = fit([sample(3, True), sample(-3, False), sample(2, True)], "change", [sample(-2, False), sample(4, True)])
    assert len(fitted.unchanged) == 2 and max(fitted.unchanged) < 0.5 < fitted.pair_probability(torch.tensor([0.95]))


def test_the_command_saves_a_calibration_that_caption_uses(detector, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(detector, model)
    settings = SyntheticSettings(image_size=64)
    write_levir_mci([SyntheticDataset(12, split, settings=settings) for split in ("val", "train")], tmp_path / "pairs")
    command = ["calibrate", "--model", str(model), "--dataset", str(tmp_path / "pairs"), "--unchanged_split", "train"]
    assert main(command) == 2
    assert "larger than the model's tile, 32 px" in capsys.readouterr().err
    processor = json.loads((model / "processor_config.json").read_text())
    processor["tile_size"] = 64
    (model / "processor_config.json").write_text(json.dumps(processor))
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["unchanged"] == 12 and report["alarm_rates"]["0.05"] is None
    assert 0 <= report["alarm_rates"]["0.1"]["changed_found"] <= 1 and len(report["mask_error"]) == 2
    saved = Calibration(**load(str(model))[1].calibration)
    assert len(saved.unchanged) == 12 and saved.temperature == report["temperature"]
    assert saved.threshold(0.1) == report["alarm_rates"]["0.1"]["threshold"]

    image = str(tmp_path / "pairs" / "images" / "val" / "A" / "val_000001.png")
    assert (
        main(["caption", image, image, "--model", str(model), "--alarm_rate", "0.01", "--output", str(tmp_path)]) == 2
    )
    assert "alarm_rate=0.01: this model knows thresholds only for rates from 0.0769" in capsys.readouterr().err


def test_a_model_that_is_no_folder_is_refused():
    with pytest.raises(FileNotFoundError, match="give the folder of a model"):
        calibrate("kcfi-tiny", "synthetic")
