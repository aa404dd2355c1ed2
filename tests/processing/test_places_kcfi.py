"""Sentences against masks: the place that a sentence names is the place in the image."""

from functools import partial

import numpy as np
import pytest

from kcfi.processing import places_kcfi
from kcfi.processing.places_kcfi import (
    IMAGE,
    UNCHANGED_SENTENCES,
    center_of,
    tells_of_change,
)
from kcfi.processing.places_kcfi import SCENE as SCENE_PLACES

SCENE = (120, 120)  # px
CORNERS = {"top left": (0, 0), "top right": (80, 0), "bottom left": (0, 80), "bottom right": (80, 80)}


def place_in_image(sentence, box, changed):
    left, top, right, bottom = box
    return places_kcfi.place_in_image(sentence, box, changed[top:bottom, left:right], SCENE)


def marked(left, top, right, bottom):
    changed = np.zeros(SCENE, bool)
    changed[top:bottom, left:right] = True
    return changed


@pytest.mark.parametrize("sentence", UNCHANGED_SENTENCES)
def test_the_five_stock_sentences_tell_of_no_change(sentence):
    assert not tells_of_change(f"{sentence.capitalize()} .")
    assert tells_of_change(f"{sentence} but for a house .")


def test_nine_places_have_nine_phrases():
    phrases = [IMAGE.phrase(x, y) for y in (0, 0.5, 1) for x in (0, 0.5, 1)]
    assert len(set(phrases)) == 9 and phrases[0] == "in the top left corner" and phrases[4] == "in the middle"
    assert IMAGE.phrase(0.32, 0.68) == "in the bottom left corner"


def test_a_map_has_compass_directions():
    assert [SCENE_PLACES.phrase(x, 0.9) for x in (0, 0.5, 1)] == [
        "in the south-west",
        "in the south",
        "in the south-east",
    ]
    changed, box = marked(82, 2, 90, 9), (80, 0, 120, 40)
    rewrite = partial(places_kcfi.place_in_image, box=box, pixels=changed[:40, 80:], size=SCENE, words=SCENE_PLACES)
    assert rewrite("a house is built at the left .") == "a house is built in the north-east of the scene ."
    assert rewrite("a house is built on the left of the road .") == "a house is built on the left of the road ."
    assert rewrite("in the top left corner of the image a house is built .").startswith(
        "in the north-east of the image"
    )
    assert rewrite("the left of the scene has changed .") == "the north-east of the scene has changed ."


def test_the_centre_is_that_of_the_pixels():
    assert center_of(marked(10, 20, 14, 21)) == (12, 20.5)


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize(
    "place",
    [
        "at the top",
        "in the lower-left corner",
        "on the right side",
        "in the center",
        "at the far right",
        "on the left hand side",
        "at the upper right corner",
        "in the right bottom corner",
    ],
)
def test_the_place_in_a_tile_becomes_the_place_in_the_scene(place, corner):
    left, top = CORNERS[corner]
    box = (left, top, left + 40, top + 40)
    changed = marked(left + 10, top + 10, left + 30, top + 30)
    assert place_in_image(f"a house is built {place} .", box, changed) == f"a house is built in the {corner} corner ."


@pytest.mark.parametrize(
    "sentence",
    [
        "houses are built on the left side of the road .",
        "a house appears at the bottom right corner of the forest .",
        "a car stops on the right road .",
        "houses are built on both sides of the road .",
        "the scene is the same as before .",
        "a road makes a right angle .",
        "trees are left in the meadow .",
        "a villa is built on top of the hill .",
    ],
)
def test_places_beside_a_thing_stay(sentence):
    assert place_in_image(sentence, (80, 80, 120, 120), marked(85, 85, 95, 95)) == sentence


def test_the_scene_may_be_named():
    sentence = "in the top left corner of the scene a road appears , a house at the top of the image ."
    moved = place_in_image(sentence, (80, 80, 120, 120), marked(85, 85, 115, 115))
    assert moved == (
        "in the bottom right corner of the scene a road appears , a house in the bottom right corner of the image ."
    )


def test_two_places_are_told_apart_by_what_changed_there():
    changed = marked(3, 50, 20, 70) | marked(100, 50, 118, 70)
    sentence = "a house appears on the left and a road is built on the right ."
    assert place_in_image(sentence, (0, 0, 120, 120), changed) == sentence
    # "left" and "right" of a tile: both lie at the left of the scene
    assert place_in_image(sentence, (0, 40, 40, 80), marked(2, 45, 38, 75)) == (
        "a house appears on the left and a road is built on the left ."
    )


def test_a_wrong_place_becomes_that_of_the_marked_pixels():
    assert place_in_image("a house appears at the top .", (0, 0, 120, 120), marked(90, 90, 100, 100)) == (
        "a house appears in the bottom right corner ."
    )


def test_without_marked_pixels_the_named_part_of_the_box_counts():
    nothing = np.zeros(SCENE, bool)
    assert place_in_image("a house appears on the right .", (0, 0, 120, 120), nothing) == (
        "a house appears on the right ."
    )
    assert place_in_image("a house appears on the right .", (0, 0, 40, 40), nothing) == (
        "a house appears in the top left corner ."
    )


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("houses appear at the top and bottom of the scene .", "houses appear PLACE of the scene ."),
        ("a road runs from the left to the right .", "a road runs PLACE ."),
        ("trees grow in the upper left and lower right corners .", "trees grow PLACE ."),
        ("cars stand on the left , right and bottom .", "cars stand PLACE ."),
        ("houses are built on both the left and right sides .", "houses are built PLACE ."),
        ("the top left corner of the scene has a house .", "the bottom right corner of the scene has a house ."),
        ("a house at the top and a road on the left appear .", "a house PLACE and a road PLACE appear ."),
    ],
)
def test_a_phrase_of_several_places_is_one(sentence, expected):
    place = "in the bottom right corner"
    assert place_in_image(sentence, (80, 80, 120, 120), marked(85, 85, 115, 115)) == expected.replace("PLACE", place)


def test_places_of_one_phrase_that_lie_apart_are_both_told():
    changed = marked(40, 2, 80, 30) | marked(40, 90, 80, 118)
    assert place_in_image("houses appear at the top and bottom .", (0, 0, 120, 120), changed) == (
        "houses appear at the top and at the bottom ."
    )
