"""The judge of real pairs: what counts as a false claim of a sentence."""

import numpy as np
import pytest
from real_levir import claims, wrong_pixels

from kcfi.training.scoring.evaluate import PairPrediction

LEFT = np.zeros((90, 90), np.uint8)
LEFT[30:60, :20] = 1
NONE = np.zeros((90, 90), np.uint8)
BUILT = ["a house is built on the left ."]
TREES = ["trees are removed ."]


@pytest.mark.parametrize(
    ("caption", "truth", "references", "expected"),
    [
        ("a house is built on the left .", LEFT, BUILT, []),
        ("A House is built on the right .", LEFT, BUILT, ["wrong place"]),
        ("a house is built on the left and a road is built on the right .", LEFT, BUILT, []),
        ("houses are built on the left and right sides of the road .", LEFT, BUILT, []),
        ("a house is built in the lower left corner .", LEFT, BUILT, ["wrong place"]),
        ("there is no difference .", LEFT, BUILT, ["missed"]),
        ("a house is built .", NONE, TREES, ["no such object", "wrong direction"]),
        ("trees are removed .", NONE, TREES, []),
        ("many houses vanish .", LEFT, BUILT, ["wrong direction"]),
        ("the building is destroyed .", LEFT, BUILT, ["wrong direction"]),
        ("a house is built .", LEFT, ["trees are removed for a new house ."], []),
        ("the trees are replaced by a house .", LEFT, BUILT, []),
    ],
)
def test_a_sentence_is_held_against_mask_and_references(caption, truth, references, expected):
    assert claims(PairPrediction("a.png", True, references, caption, truth, truth)) == expected


def test_of_an_unchanged_pair_every_told_change_is_an_alarm():
    same = ["there is no difference ."]
    assert claims(PairPrediction("a.png", False, same, "a road is built .", NONE, NONE)) == ["false alarm"]
    assert claims(PairPrediction("a.png", False, same, same[0], NONE, NONE)) == []


def test_wrong_pixels_are_those_marked_in_one_mask_alone():
    assert wrong_pixels(PairPrediction("a.png", True, BUILT, "", LEFT, NONE)) == 600
