"""Probabilities of pixels and pairs, and the threshold of an alarm rate."""

import numpy as np
import pytest
import torch

from kcfi.models import load
from kcfi.processing import Describer, InputError, KCFIProcessor
from kcfi.processing.calibration_kcfi import EVIDENCE, Calibration, evidence
from kcfi.processing.describer_kcfi import changed_pixels
from kcfi.processing.places_kcfi import tells_of_change


def test_a_temperature_above_one_moves_probabilities_towards_the_middle():
    logits = torch.tensor([0.0, 4.0])[:, None, None]
    sharp, soft = (Calibration(temperature=t).class_probabilities(logits)[1].item() for t in (1.0, 2.0))
    assert sharp == pytest.approx(1 / (1 + np.exp(-4))) and soft == pytest.approx(1 / (1 + np.exp(-2)))


def test_the_likeliest_pixels_decide_whether_a_pair_changed():
    changes = torch.full((50, 50), 0.01)
    changes[:10, :10] = 0.9  # EVIDENCE pixels
    assert changes[:10, :10].numel() == EVIDENCE
    assert Calibration().pair_probability(changes) == pytest.approx(0.9, abs=1e-4)
    assert evidence(changes) == pytest.approx(np.log(9), abs=1e-3)
    moved = Calibration(slope=2.0, intercept=-1.0).pair_probability(changes)
    assert moved == pytest.approx(1 / (1 + np.exp(1 - 2 * np.log(9))), abs=1e-4)
    assert Calibration().pair_probability(torch.tensor([0.25])) == pytest.approx(0.25)  # fewer pixels than EVIDENCE


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_at_most_the_asked_share_of_new_unchanged_pairs_is_above_the_threshold(rate):
    generator = np.random.default_rng(0)
    above = []
    for _ in range(300):
        threshold = Calibration(unchanged=generator.random(120)).threshold(rate)
        above.append((generator.random(500) > threshold).mean())
    assert 0.5 * rate < np.mean(above) <= rate * 1.05


def test_a_rate_that_too_few_pairs_were_measured_for_is_refused():
    calibration = Calibration(unchanged=np.linspace(0, 1, 98))
    with pytest.raises(InputError, match=r"for rates from 0.0101, having seen 98 unchanged pairs"):
        calibration.threshold(0.01)
    assert Calibration(unchanged=np.linspace(0, 1, 99)).threshold(0.01) == 1
    with pytest.raises(InputError, match=r"for none.*kcfi calibrate"):
        Calibration().threshold(0.5)
    with pytest.raises(InputError, match="give a share"):
        calibration.threshold(1.0)


def describers(detector, alarm_rate, **calibration):
    model, processor = load(str(detector))
    processor.calibration = calibration
    return Describer(model, processor, alarm_rate=alarm_rate)


def test_with_an_alarm_rate_the_probability_decides_for_mask_and_sentence_alike(detector, make_pair):
    pair = make_pair(32, 32, (8, 8, 24, 24))
    plain = describers(detector, None).describe(*pair, regions=True)
    assert plain.changed_probability > 0.5 and plain.regions
    left, top, right, bottom = plain.regions[0].box
    marked = plain.mask[top:bottom, left:right] > 0
    assert plain.regions[0].probability == pytest.approx(plain.probabilities[top:bottom, left:right][marked].mean())

    below = describers(detector, 0.5, unchanged=[plain.changed_probability] * 3).describe(*pair, regions=True)
    assert below.caption == "the scene is the same as before ." and not below.mask.any() and not below.regions
    above = describers(detector, 0.5, unchanged=[plain.changed_probability - 0.01] * 3).describe(*pair)
    assert tells_of_change(above.caption) and np.array_equal(above.mask, plain.mask)


def test_of_a_large_image_only_the_tiles_above_the_threshold_keep_their_marks(detector, make_pair):
    pair = make_pair(96, 32, (0, 8, 16, 24))
    plain = describers(detector, None).describe(*pair)
    assert changed_pixels(plain.mask).any()
    surest = plain.changed_probability
    kept = describers(detector, 0.5, unchanged=[surest - 1e-3] * 3).describe(*pair)
    assert np.array_equal(kept.mask[:, :24], plain.mask[:, :24]) and kept.changed_probability == surest
    none = describers(detector, 0.5, unchanged=[surest] * 3).describe(*pair)
    assert not none.mask.any() and none.caption == "the scene is the same as before ."


def test_a_calibration_is_saved_with_the_processor_and_wrong_fields_are_refused(detector, tmp_path):
    _, processor = load(str(detector))
    processor.calibration = {"temperature": 2.0, "unchanged": [0.25]}
    processor.save_pretrained(tmp_path)
    again = KCFIProcessor.from_pretrained(tmp_path)
    assert Calibration(**again.calibration) == Calibration(2.0, unchanged=[0.25])
    with pytest.raises(TypeError, match="heat"):
        KCFIProcessor(processor.image_processor, processor.tokenizer, calibration={"heat": 1})


def test_a_saved_threshold_is_the_probability_that_it_was_read_off():
    unchanged = [2e-6 + index * 1e-8 for index in range(99)]
    saved = Calibration(**Calibration(unchanged=unchanged).to_dict())
    assert sum(value > saved.threshold(0.01) for value in unchanged) == 0
    with pytest.raises(InputError, match=r"slope -1\.0 turns probabilities around"):
        Calibration(slope=-1.0)
