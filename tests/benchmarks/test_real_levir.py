"""The judge of real pairs: what counts as a false claim of a sentence."""

import json

import numpy as np
import pytest
from real_levir import against, claims, read_before, repeats, wrong_pixels

from kcfi.processing import InputError
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


def test_a_sentence_repeats_a_phrase_of_four_words():
    assert repeats("A road is built and a road is built .")
    assert not repeats("a road is built on the left and a house on the left .") and not repeats("no change")


def judged(cider_d, repeated=0, pairs=163, **false):
    """What the judge writes of a model, as far as `against` reads it."""
    return [
        {"captions": "model", "of": "all", "cider_d": cider_d},
        {"captions": "always the same", "of": "all", "cider_d": 73.0},
        {"claims": {name.replace("_", " "): count for name, count in false.items()}, "repeated phrases": repeated}
        | {"pairs": pairs},
    ]


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        (judged(95.0, missed=4, false_alarm=3), "gains CIDEr-D and loses truth"),
        (judged(95.0, missed=6), "gains CIDEr-D and keeps to the truth"),
        (judged(95.0, repeated=1, missed=6), "gains CIDEr-D and loses truth"),
        (judged(90.0, missed=7), "does not gain CIDEr-D and loses truth"),
    ],
)
def test_a_model_that_gains_cider_d_by_claiming_what_is_false_is_reported_as_such(now, verdict):
    assert against(judged(90.0, missed=4, wrong_place=2), now)["against"] == verdict


def test_lines_of_an_earlier_version_are_refused_at_the_start(tmp_path):
    file = tmp_path / "real_levir.json"
    file.write_text(json.dumps(judged(90.0)))
    assert read_before(tmp_path) == judged(90.0)
    file.write_text(json.dumps([{"claims": {}, "pairs": 163}]))
    with pytest.raises(InputError, match=r"real_levir\.json does not count repeated phrases"):
        read_before(tmp_path)


def test_the_differences_stand_beside_the_verdict_and_other_pairs_are_refused():
    line = against(judged(90.0, missed=4), judged(95.5, repeated=2, missed=3))
    assert (line["cider_d"], line["false claims"], line["repeated phrases"]) == (5.5, -1, 2)
    with pytest.raises(InputError, match="163 pairs before and 148 now"):
        against(judged(90.0), judged(90.0, pairs=148))
