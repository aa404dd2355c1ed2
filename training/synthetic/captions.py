"""Captions of synthetic scenes: the facts that hold for a pair, and sentences in LEVIR-CC's words that state them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kcfi.processing.places_kcfi import UNCHANGED_SENTENCES
from kcfi.training.synthetic.layout import ObjectKind

Ground = Literal["trees", "bareland", "grass", ""]


@dataclass(frozen=True)
class ObjectChange:
    """The changed objects of one kind, as measured on the mask.

    Attributes:
        kind: What changed.
        count: Objects of this kind in the mask (every one of them clearly visible).
        position: Where their pixels are ("top left corner", "left", "center", ...), "" when spread out.
        road: What they stand along: "road", "roads", "new road" or "new roads" (which changed as well), "" if one of
            them stands along none.
        both_sides: They stand on both sides of one road.
    """

    kind: ObjectKind
    count: int
    position: str
    road: Literal["", "road", "roads", "new road", "new roads"] = ""
    both_sides: bool = False


@dataclass(frozen=True)
class Change:
    """The facts that captions may state about a pair; `objects` is empty if and only if the mask is.

    Attributes:
        objects: One entry per kind of changed object.
        appears: True if they were built, False if they were removed.
        position: Where all changed pixels are together, "" when spread out.
        ground: What covers most of these pixels at the date without the objects, "" when mixed.
    """

    objects: tuple[ObjectChange, ...]
    appears: bool = True
    position: str = ""
    ground: Ground = ""


POSITION_SHARE = 0.85  # of the pixels must lie in the half (or central quarter) that is named


def locate(pixels: NDArray[np.bool_]) -> str:
    """Name the part of the image in which most of the given pixels lie.

    Args:
        pixels: (H, W), at least one True.

    Returns:
        "top", "bottom", "left", "right", a corner such as "top left corner", "center", or "" when they are spread out.
    """
    height, width = pixels.shape
    rows, columns = pixels.sum(1) / pixels.sum(), pixels.sum(0) / pixels.sum()
    y, x = rows @ (np.arange(height) + 0.5) / height, columns @ (np.arange(width) + 0.5) / width

    def half(shares: NDArray[Any], middle: float, low: str, high: str) -> str:
        first = shares[: len(shares) // 2].sum()
        if first >= POSITION_SHARE and middle < 0.4:
            return low
        return high if 1 - first >= POSITION_SHARE and middle > 0.6 else ""

    words = [word for word in (half(rows, y, "top", "bottom"), half(columns, x, "left", "right")) if word]
    if len(words) == 2:
        return " ".join(words) + " corner"
    if words:
        return words[0]
    inner = pixels[height // 4 : -(height // 4), width // 4 : -(width // 4)]
    return "center" if inner.sum() >= POSITION_SHARE * pixels.sum() else ""


NOUNS: dict[ObjectKind, list[str]] = {
    "villa": ["villa", "house"],
    "large building": ["large building"],
    "road": ["road"],
}


def _noun_phrases(change: ObjectChange, appears: bool) -> list[str]:
    """Ways to name the changed objects of one kind with their rough count."""
    nouns = NOUNS[change.kind]
    if change.count == 1:
        return [f"a {noun}" for noun in nouns] + (["a new road"] if change.kind == "road" and appears else [])
    if change.count == 2:
        words = ["two"]
    elif change.count <= 6:
        words = ["some", "several", *{3: ["three"], 4: ["four"]}.get(change.count, [])]
    else:
        words = ["many", "lots of", *(["rows of"] if change.kind == "villa" and change.road else [])]
    return [f"{word} {noun}s" for word in words for noun in nouns]


def _verbs(appears: bool, plural: bool) -> list[str]:
    be, have = ("are", "have") if plural else ("is", "has")
    if appears:
        return [
            "appear" if plural else "appears",
            f"{be} built",
            f"{have} been built",
            f"{be} constructed",
            "show up" if plural else "shows up",
        ]
    return [
        "disappear" if plural else "disappears",
        f"{be} removed",
        f"{have} been removed",
        f"{have} disappeared",
        f"{be} demolished",
    ]


def _position_phrases(position: str) -> list[str]:
    if not position:
        return []
    if position == "center":
        return ["in the center of the scene", "in the middle of the scene"]
    if position.endswith("corner"):
        return [f"in the {position} of the scene", f"at the {position}"]
    if position in ("left", "right"):
        return [f"on the {position} side of the scene", f"on the {position}"]
    return [f"at the {position} of the scene", f"at the {position}"]


def _road_phrases(change: ObjectChange) -> list[str]:
    """Where the objects stand relative to a road that is there at the same date."""
    if not change.road:
        return []
    if change.kind == "large building":
        return [f"beside the {change.road}", f"next to the {change.road}"]
    if change.both_sides:
        return [f"along the {change.road}", f"on both sides of the {change.road}"]
    return [f"beside the {change.road}", *([f"along the {change.road}"] if change.count > 1 else [])]


GROUND_PHRASES = {"trees": ["in the woods"], "bareland": ["on the bareland"], "grass": ["on the grass"], "": []}


def describe(change: Change, rng: np.random.Generator) -> list[str]:
    """Five sentences in LEVIR-CC's words that say nothing but the given facts, every changed kind named in each.

    A changed object is indefinite ("a road", "some villas"), what is there at both dates definite ("the road"), and
    "the new road" is one that changed.

    Returns:
        Lower-case sentences that end in " ."; LEVIR-CC's five stock sentences when nothing changed.
    """
    if not change.objects:
        return [f"{sentence} ." for sentence in UNCHANGED_SENTENCES]
    sentences: list[str] = []
    while len(sentences) < 5:
        sentence = _sentence(change, rng) + " ."
        if sentence not in sentences:
            sentences.append(sentence)
    return sentences


def _sentence(change: Change, rng: np.random.Generator) -> str:
    def pick(options: Sequence[Any]) -> Any:
        return options[int(rng.integers(len(options)))]

    def subject(objects: Sequence[ObjectChange]) -> str:
        return " and ".join(pick(_noun_phrases(entry, change.appears)) for entry in objects)

    def clause(objects: Sequence[ObjectChange], places: Sequence[str]) -> str:
        verb = pick(_verbs(change.appears, sum(entry.count for entry in objects) > 1))
        return " ".join([subject(objects), verb, *([pick(places)] if places else [])])

    first, last = change.objects[0], change.objects[-1]
    position, ground = _position_phrases(change.position), GROUND_PHRASES[change.ground]
    plural = len(change.objects) > 1 or first.count > 1
    if not change.appears:
        forms = [clause(change.objects, position), clause(change.objects[::-1], position)]
        if len(change.objects) == 1:
            forms.append(clause([first], _road_phrases(first)))
        if change.ground:
            forms.append(f"{subject(change.objects)} {'are' if plural else 'is'} replaced by {change.ground}")
        return str(pick(forms))

    forms = [clause(change.objects, position), clause(change.objects, ground or position)]
    if len(change.objects) == 1:
        forms.append(clause([first], _road_phrases(first) or position))
        forms.append(clause([first], _road_phrases(first) or ground))
    else:  # a road, and buildings that may stand along it
        beside = _road_phrases(last)
        forms.append(clause([first], ground) + " and " + clause([last], _position_phrases(last.position)))
        forms.append(clause([last], beside) if last.road.startswith("new") else clause([last, first], position))
        forms.append(clause([first], _position_phrases(first.position)) + " and " + clause([last], beside[:1]))
        if last.kind == "villa" and last.both_sides:
            forms.append(f"{clause([first], [])} with {subject([last])} on both sides")
    if change.ground == "trees":
        forms.append("the trees are removed and " + clause(change.objects, position))
        forms.append(f"{subject(change.objects)} {'replace' if plural else 'replaces'} the trees")
    return str(pick(forms))
