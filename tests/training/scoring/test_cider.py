import math

import pytest
from pycocoevalcap.cider.cider import Cider

from kcfi.training.scoring.cider import CiderD, grams

REFERENCES = [
    ["a house appears on the left", "one house is built on the left"],
    ["a road and many houses are built", "many houses are built along the road", "a road appears"],
    ["the scene is the same as before", "there is no difference"],
    ["the scene is the same as before", "no change has occurred"],
]
CAPTIONS = ["a house is built on the left", "a road and and many houses", "the scene is the same as before", "trees"]


def test_scores_are_those_of_pycocoevalcap_where_the_references_are():
    _, expected = Cider().compute_score(dict(enumerate(REFERENCES)), {n: [text] for n, text in enumerate(CAPTIONS)})
    cider = CiderD(REFERENCES)
    found = [cider(caption, references) for caption, references in zip(CAPTIONS, REFERENCES, strict=True)]
    assert found == pytest.approx(expected.tolist()) and found[2] > 1 and found[3] == 0


def test_a_score_by_hand():
    """Two documents; "a" is in both and weighs nothing, "b" and "c" are each in one and weigh log 2."""
    cider = CiderD([["a b"], ["a c"]])
    # 1-grams: the shared one is b, beside nothing else; 2-grams: "a b" against "b" alone, which has none
    assert cider("b", ["a b"]) == pytest.approx(10 / 4 * math.exp(-(1**2) / (2 * 6**2)))
    assert cider("a b", ["a b"]) == pytest.approx(10 * 2 / 4)
    assert cider("a b", ["a b", "a c"]) == pytest.approx(10 * 2 / 4 / 2)
    assert cider("", ["a b"]) == cider("a", ["a b"]) == 0


def test_a_word_that_is_repeated_does_not_count_more_often_than_the_reference_has_it():
    cider = CiderD([["a house"], ["a road"]])
    assert cider("house house house", ["a house"]) < cider("house", ["a house"])
    assert grams("a a a".split())["a", "a"] == 2
