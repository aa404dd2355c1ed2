"""Augmentation that keeps a pair, its mask and its captions true to each other.

A mirrored pair has mirrored captions: "top left corner" becomes "top right corner". A pair with a caption whose words
cannot be exchanged safely ("the cars have left", "under the viaducts") is not mirrored. Light and colour are drawn for
each date on its own, since two dates differ in them without any change that a caption would name.

The words are those of LEVIR-CC's 50,385 captions and near relatives ("rightmost") that it does not have.
"""

import random
import re
from typing import Any, Literal

from PIL import Image, ImageEnhance

Axis = Literal["horizontal", "vertical"]  # left and right change places, or top and bottom

_TRANSPOSED = {"horizontal": Image.Transpose.FLIP_LEFT_RIGHT, "vertical": Image.Transpose.FLIP_TOP_BOTTOM}
_OPPOSITES: dict[Axis, list[tuple[str, str]]] = {
    "horizontal": [("left", "right")],
    "vertical": [("top", "bottom"), ("upper", "lower"), ("above", "below")],
}
_EXCHANGED = {
    axis: {
        form(word): form(other)
        for pair in pairs
        for word, other in (pair, pair[::-1])
        for form in (str.lower, str.capitalize, str.upper)
    }
    for axis, pairs in _OPPOSITES.items()
}
_RIGHT_ANGLE = r"(?! angles?\b)"  # in a mirror it is one still
_WORDS = {
    axis: re.compile(rf"\b(?:{'|'.join(words)})(?=(?:most|hand|side|wards?)?\b){_RIGHT_ANGLE}")
    for axis, words in _EXCHANGED.items()
}
_COMPASS = r"\b(?:north|south|east|west|clockwise|counterclockwise|anticlockwise)"
# "left" and "right" are sides behind these words. Elsewhere they may be a verb ("have left") or an adverb ("right next
# to"), and "the left space" may be what remains.
_BEFORE_A_SIDE = "the|its|and|or|in|on|from|to|top|bottom|upper|lower|higher|middle|center|central|far"
_REFUSED: dict[Axis, str] = {
    "horizontal": rf"{_COMPASS}|\b(?!(?:{_BEFORE_A_SIDE})\b)[a-z]+[ -](?:left|right)\b{_RIGHT_ANGLE}"
    r"|\b(?:left|right) (?:spaces?|the|an?)\b",
    # words without a counterpart, and what lies at another height rather than elsewhere in the image
    "vertical": rf"{_COMPASS}|\b(?:higher|highest|under|beneath|underneath|base|ahead|flyover)\b",
}

JITTER = 0.2  # brightness, contrast and saturation of a date are scaled by 1 - JITTER to 1 + JITTER


def flip_caption(caption: str, axis: Axis) -> str | None:
    """Exchange the words of direction in a caption.

    Args:
        caption: English sentence.
        axis: "horizontal" exchanges left and right, "vertical" top and bottom, upper and lower, above and below.

    Returns:
        The caption of the mirrored pair, or None if it has a word that cannot be exchanged safely.
    """
    if re.search(_REFUSED[axis], caption, re.IGNORECASE):
        return None
    return _WORDS[axis].sub(lambda word: _EXCHANGED[axis][word[0]], caption)


def flip(example: dict[str, Any], axis: Axis) -> dict[str, Any]:
    """Mirror both dates, the mask and all captions of an example (see `pairs.py`).

    Returns:
        The mirrored example, or the same one if a caption cannot be mirrored.
    """
    captions = [flip_caption(caption, axis) for caption in example["captions"]]
    if None in captions:
        return example
    images = {key: example[key] for key in ("image_before", "image_after", "mask") if example[key] is not None}
    return {
        **example,
        **{key: image.transpose(_TRANSPOSED[axis]) for key, image in images.items()},
        "captions": captions,
    }


def jitter(image: Image.Image, chance: random.Random) -> Image.Image:
    """Scale brightness, contrast and saturation of an RGB image by factors drawn from `chance`."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(chance.uniform(1 - JITTER, 1 + JITTER))
    return image


def augment(example: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Mirror an example along each axis with probability 1/2 where its captions allow it, and jitter each date.

    Args:
        example: As in `pairs.py`; it is not changed.
        chance: The only source of chance.
    """
    axes: tuple[Axis, ...] = ("horizontal", "vertical")
    for axis in axes:
        if chance.random() < 0.5:
            example = flip(example, axis)
    return example | {key: jitter(example[key], chance) for key in ("image_before", "image_after")}
