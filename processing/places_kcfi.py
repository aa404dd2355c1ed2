"""Sentences against masks: does a sentence tell of a change, and is the place that it names the place in the image?"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

# The five sentences that every unchanged pair of LEVIR-CC carries, and no changed one.
UNCHANGED_SENTENCES = (
    "there is no difference",
    "the two scenes seem identical",
    "the scene is the same as before",
    "no change has occurred",
    "almost nothing has changed",
)

# Words of a place, and the row or the column of the image (thirds) that they name. The middle is both.
_ROWS = {"top": 0, "upper": 0, "bottom": 2, "lower": 2}
_COLUMNS = {"left": 0, "right": 2}
_MIDDLE = ("middle", "center", "centre", "central")
_WORD = rf"(?:{'|'.join([*_ROWS, *_COLUMNS, *_MIDDLE])})(?:most)?"
_PART = rf"{_WORD}(?:[ -]{_WORD})?(?:[ -]hand)?"
_NOUN = r"(?:corner|side|edge|part|area|half|region|section|portion|end)s?"
_PREPOSITION = r"(?:in|at|on|to|from|near|around)"
# "at the bottom", "in the lower-left corner of the scene", "on the left and right sides": one phrase, however many
# places it names. Of a thing ("on the left of the road") it is no place in the image; before a noun ("on the right
# road") it is that thing's.
_PLACE = re.compile(
    rf"\b{_PREPOSITION} (?:both )?the (?:far |very )?(?P<parts>{_PART}(?: {_NOUN})?"
    rf"(?:(?: ?,| and| or| to)+ (?:{_PREPOSITION} )?(?:the )?{_PART}(?: {_NOUN})?)*)"
    r"(?P<whole> of (?:the|this) (?:scene|image|picture|photo|area|region|map|view))?"
    r"(?=\s*(?:[.,;]|$)|\s+(?:a|an|the|some|many|several|lots|one|two|three|there|and|with|is|are|was|were|has|have|had"
    r"|by|in|on|at|to|as|along|next|near|beside|outside|while|where|which|that|instead|(?:dis)?appear\w*|becom\w*"
    r"|became|turn\w*|replac\w*|remain\w*|chang\w*|vanish\w*|connected|surrounded|parallel)\b)",
    re.IGNORECASE,
)
# "the top left corner of the scene has changed": a place of the image that is itself told of
_NAMED = re.compile(
    rf"\bthe (?P<parts>{_PART}(?: {_NOUN})?)(?P<whole> of (?:the|this) (?:scene|image|picture|photo|map|view))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Places:
    """The words for places.

    Args:
        phrases: 3 rows, from the top, of 3 places, from the left.
        whole: follows a place whose sentence does not say of what it is a part.
    """

    phrases: tuple[tuple[str, str, str], ...]
    whole: str = ""

    def phrase(self, x: float, y: float) -> str:
        """The words for a point of the image: "in the top left corner", "on the right", "in the middle", ...

        Args:
            x: share of the width, 0 (left) to 1.
            y: share of the height, 0 (top) to 1.
        """
        return self.phrases[min(2, int(3 * y))][min(2, int(3 * x))]


IMAGE = Places(
    (
        ("in the top left corner", "at the top", "in the top right corner"),
        ("on the left", "in the middle", "on the right"),
        ("in the bottom left corner", "at the bottom", "in the bottom right corner"),
    )
)
SCENE = Places(  # of a map: its upper edge is north
    (
        ("in the north-west", "in the north", "in the north-east"),
        ("in the west", "in the centre", "in the east"),
        ("in the south-west", "in the south", "in the south-east"),
    ),
    " of the scene",
)


def tells_of_change(sentence: str) -> bool:
    """Whether a sentence is none of the five stock sentences for unchanged pairs."""
    return " ".join(sentence.lower().split()).rstrip(" .") not in UNCHANGED_SENTENCES


def center_of(changed: NDArray[np.bool_]) -> tuple[float, float]:
    """Mean position x, y of the marked pixels of a map (H, W), in pixels from the top left corner."""
    rows, columns = np.nonzero(changed)
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def place_in_image(
    sentence: str, box: Box, pixels: NDArray[np.bool_], size: tuple[int, int], words: Places = IMAGE
) -> str:
    """Rewrite the places that a sentence about a part of an image names: to where that is in the whole image.

    "at the top" of a tile in the bottom right corner becomes "in the bottom right corner". A place stands for the
    changed pixels in that third of the box, for all of the box's where that third has none, and for the middle of that
    third where nothing is marked. Places beside a thing ("on the left of the road") stay.

    Args:
        sentence: about `box`.
        box: part of the image, in pixels.
        pixels: (bottom - top, right - left) map of the box: what the sentence describes.
        size: width and height of the image.
        words: for its places.
    """

    def moved(match: re.Match[str]) -> str:
        places = [_moved(part, box, pixels, size, words) for part in _parts(match["parts"])]
        return " and ".join(dict.fromkeys(places)) + (match["whole"] or words.whole)

    def named(match: re.Match[str]) -> str:
        [part] = _parts(match["parts"])
        return _moved(part, box, pixels, size, words).partition(" ")[2] + match["whole"]

    pieces, end = [], 0
    for match in _PLACE.finditer(sentence):
        pieces += [_NAMED.sub(named, sentence[end : match.start()]), moved(match)]
        end = match.end()
    return "".join([*pieces, _NAMED.sub(named, sentence[end:])])


def _parts(text: str) -> list[str]:
    """The places of a phrase: "top and bottom" -> "top", "bottom"."""
    return [match[0].lower() for match in re.finditer(_PART, text, re.IGNORECASE)]


def _moved(part: str, box: Box, pixels: NDArray[np.bool_], size: tuple[int, int], words: Places) -> str:
    """The phrase for where one place of a box lies in the image; see `place_in_image`."""
    named = [word.removesuffix("most") for word in re.split("[ -]", part)]
    middle = any(word in _MIDDLE for word in named)
    row = next((_ROWS[word] for word in named if word in _ROWS), 1 if middle else None)
    column = next((_COLUMNS[word] for word in named if word in _COLUMNS), 1 if middle else None)
    (y0, y1), (x0, x1) = _third(row, pixels.shape[0]), _third(column, pixels.shape[1])
    inside = pixels[y0:y1, x0:x1]
    if inside.any():
        x, y = center_of(inside)
        x, y = x + x0, y + y0
    elif pixels.any():
        x, y = center_of(pixels)
    else:
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return words.phrase((box[0] + x) / size[0], (box[1] + y) / size[1])


def _third(index: int | None, length: int) -> tuple[int, int]:
    """Where the first, middle or last third of a length begins and ends; the whole length for None."""
    return (0, length) if index is None else (index * length // 3, (index + 1) * length // 3)
