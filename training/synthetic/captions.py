"""Captions of synthetic scenes: the facts that hold for a pair, and sentences in LEVIR-CC's words that state them."""

from collections.abc import Mapping, Sequence
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
        rows: Villas: sides of roads along which at least `ROWS` of them stand, 0 unless all stand so.
        parking: A large building with a parking lot.
    """

    kind: ObjectKind
    count: int
    position: str
    road: Literal["", "road", "roads", "new road", "new roads"] = ""
    both_sides: bool = False
    rows: int = 0
    parking: bool = False


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


# Wordings with how often LEVIR-CC's captions of changed pairs use them, roughly, relative to each other in a table
# (counted in the train split: `docs/real_pairs.md`). A sentence is made of facts; no sentence of the data set is kept.
Wordings = Mapping[str, float]

NOUNS: dict[ObjectKind, Wordings] = {
    "villa": {"house": 6, "building": 2, "villa": 2, "detached house": 0.6},
    "large building": {"large building": 3, "building": 2},
    "road": {"road": 1},
}
ROWS = 3  # houses along one side of a road are a row from so many on


def _some(count: int) -> Wordings:
    """Words for a rough count of 2 or more."""
    if count > 6:
        return {"many": 5, "lots of": 0.7, "massive": 0.5}
    exact = {2: {"two": 1.0}, 3: {"three": 3.0}, 4: {"four": 1.5}}.get(count, {})
    return exact if count == 2 else {**exact, "some": 3, "several": 1.5}


def _subjects(change: ObjectChange, appears: bool, alone: bool) -> Wordings:
    """Ways to name the changed objects of one kind with their rough count.

    Args:
        change: the objects.
        appears: whether they were built.
        alone: whether no other kind of building changed, so that "buildings" says which.
    """
    nouns = {noun: weight for noun, weight in NOUNS[change.kind].items() if alone or noun != "building"}
    if change.count == 1:
        named = {f"a {noun}": weight for noun, weight in nouns.items()}
        if change.kind == "road" and appears:
            named |= {"a new road": 0.3}
        if change.parking and appears:
            named |= {f"{name} with a parking lot": weight for name, weight in named.items()}
        return named
    named = {f"{word} {noun}s": a * b for word, a in _some(change.count).items() for noun, b in nouns.items()}
    if change.kind == "villa" and change.rows:
        words = {1: "a row of", 2: "two rows of", 3: "three rows of"}
        row = words.get(change.rows, "rows of")
        named |= {f"{row} {noun}s": 1.5 * weight for noun, weight in nouns.items()}
        if change.rows > 1:
            named |= {f"rows of {noun}s": weight for noun, weight in nouns.items()}
    return named


def _verbs(appears: bool, plural: bool) -> Wordings:
    be, have = ("are", "have") if plural else ("is", "has")
    if appears:
        return {
            f"{be} built": 5,
            "appear" if plural else "appears": 2.5,
            f"{be} constructed": 1.5,
            f"{have} been built": 1,
            f"{have} been constructed": 0.4,
            "show up" if plural else "shows up": 0.3,
        }
    return {
        f"{be} removed": 3,
        "disappear" if plural else "disappears": 2,
        f"{have} been removed": 1.5,
        f"{have} disappeared": 0.5,
        f"{be} demolished": 0.5,
    }


def _positions(position: str) -> Wordings:
    if not position:
        return {}
    if position == "center":
        return {"in the center of the scene": 2, "in the middle of the scene": 1, "in the middle": 0.5}
    if position.endswith("corner"):
        upper = position.replace("top", "upper").replace("bottom", "lower")
        return {
            f"in the {position} of the scene": 2,
            f"in the {upper}": 1,
            f"in the {position}": 1,
            f"on the {upper.removesuffix(' corner')}": 0.7,
        }
    if position in ("left", "right"):
        return {f"on the {position} side of the scene": 2, f"on the {position}": 1.5}
    return {f"at the {position} of the scene": 2, f"at the {position}": 2}


def _along(change: ObjectChange) -> Wordings:
    """Where the objects stand relative to a road that is there at the same date; a new road may be just "the road"."""
    if not change.road:
        return {}
    old, near = change.road.removeprefix("new "), {"beside": 2.0, "next to": 1.0}
    if change.kind == "villa" and change.count > 1:
        near = {"on both sides of": 4.0, "along": 4.0} if change.both_sides else {"along": 4.0, "beside": 1.0}
    said = {f"{word} the {old}": weight for word, weight in near.items()}
    if change.road != old:
        said |= {f"{word} the newly built {old}": 0.2 * weight for word, weight in near.items()}
    return said


GROUNDS: dict[Ground, Wordings] = {
    "trees": {"in the woods": 2, "in the forest": 1},
    "bareland": {"on the bareland": 4, "in the bareland": 1.5, "on bareland": 1, "in the desert": 1},
    "grass": {"on the grass": 1, "on the meadow": 0.6},
    "": {},
}
REPLACED = {"trees": {"trees": 3, "woods": 1}, "bareland": {"bareland": 1}, "grass": {"grass": 1}}


def describe(change: Change, rng: np.random.Generator) -> list[str]:
    """Five sentences in LEVIR-CC's words, about as frequent as there, that say nothing but the given facts.

    Buildings that changed are named in every sentence; of a road that changed with them, some only say that the
    buildings stand along it, as annotators do. "The newly built road" is one that changed.

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
    """One sentence, drawn by the weights of the wordings."""

    def pick(wordings: Wordings) -> str:
        ends = np.cumsum(list(wordings.values()))
        return list(wordings)[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]

    def maybe(*places: Wordings) -> str:
        """A place of the first kind that there is, behind a space."""
        return next((f" {pick(place)}" for place in places if place), "")

    buildings = [entry for entry in change.objects if entry.kind != "road"]
    road = next((entry for entry in change.objects if entry.kind == "road"), None)
    named = {e.kind: pick(_subjects(e, change.appears, len(buildings) < 2)) for e in change.objects}

    def clause(objects: Sequence[ObjectChange], *places: str) -> str:
        """Subject, verb and places; "a row of houses is built"."""
        text = " and ".join(named[entry.kind] for entry in objects)
        plural = len(objects) > 1 or not text.startswith("a ")
        return f"{text} {pick(_verbs(change.appears, plural))}{''.join(places)}"

    where, ground, everything = _positions(change.position), GROUNDS[change.ground], list(change.objects)
    subject = " and ".join(named[entry.kind] for entry in everything)
    several = len(everything) > 1 or not subject.startswith("a ")
    forms: dict[str, float] = {clause(everything): 0.5}
    if not change.appears:
        forms[clause(everything[::-1], maybe(where))] = 1.5
        if len(everything) == 1:
            forms[clause(everything, maybe(_along(everything[0]), where))] = 1
        if change.ground:
            forms[f"{subject} {'are' if several else 'is'} replaced by {pick(REPLACED[change.ground])}"] = 0.7
        return pick(forms)

    old = pick({"trees": 3, "woods": 0.7}) if change.ground == "trees" else ""
    if where:
        forms[clause(everything[::-1], maybe(where))] = 2
    if ground:
        forms[clause(everything[::-1], maybe(ground))] = 2.5
    if old:
        forms[f"the {old} are removed and " + clause(everything, maybe(where) if rng.random() < 0.3 else "")] = 1.5
        forms[f"{subject} {'replace' if several else 'replaces'} the {old}"] = 1
        forms[f"the {old} are replaced by {subject}"] = 0.5
    along = _along(buildings[-1]) if buildings else {}
    if along:
        forms[clause(buildings, maybe(along))] = 4
        forms[clause(buildings, maybe(along), maybe(ground, where))] = 1.5
    if road and len(buildings) == 1:
        houses = named[buildings[0].kind]
        if along:
            sides = "on both sides" if buildings[0].both_sides else "along" if buildings[0].count > 1 else "beside"
            roads = f"{named['road']} with {houses} {sides}"
            forms[f"{roads} {pick(_verbs(True, not roads.startswith('a ')))}{maybe(ground, where)}"] = 1.5
        if buildings[0].kind == "villa" and buildings[0].count > 6:
            roads = "roads" if road.count > 1 else "a road"
            forms[f"a residential area with many houses and {roads} {pick(_verbs(True, False))}"] = 1.5
    return pick(forms)
