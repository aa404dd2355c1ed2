"""A question about a report in plain English -> what it asks for, by a small grammar.

Every word must have a meaning here: what is not understood is said, and no question is answered that was not asked.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from kcfi.processing import InputError
from kcfi.scenes.summary import SQUARE_METRES_PER_HECTARE

Type = Literal["yes/no", "count", "area", "where", "what"]

EXAMPLES = (
    "Did any building appear in the north-east?",
    "How many roads were removed with a probability above 0.8?",
    "How large is the area of new buildings larger than 500 m2?",
    "Where is the largest change?",
    "What happened at 117.305, 31.212?",
    "Which buildings changed in 117.30, 31.20, 117.31, 31.22?",
)
# A side of the scene is its whole third; a corner and the centre are one of its nine fields.
CORNERS = ("north-west", "north-east", "south-west", "south-east")
SIDES = {
    side: (*(corner for corner in CORNERS if side in corner), side) for side in ("north", "south", "west", "east")
}
FIELDS = {**SIDES, **{corner: (corner,) for corner in CORNERS}, "centre": ("centre",)}

CLASSES = {  # words for the classes of kcfi-tiny; any other class is called by its own name
    "building": r"buildings?|houses?|homes?|villas?|halls?",
    "road": r"roads?|streets?",
}
ANYTHING = r"changes?|differences?|anything|something|everything|polygons?|regions?"
KINDS = {
    "appeared": r"appear(?:s|ed)?|new(?:ly)?|built|constructed|constructions?|erected|added|emerged?",
    "removed": r"removed|demolished|disappear(?:s|ed)?|vanish(?:ed)?|torn down|destroyed|lost|gone|missing",
}
HEADS: tuple[tuple[str, Type], ...] = (  # how a question begins; the first that fits
    (r"how many (?:square (?:kilo)?met(?:re|er)s|m2|m²|ha|hectares|km2|pixels|px)(?: of)?", "area"),
    (r"how many(?: of)?|count|(?:what is )?(?:the )?number of", "count"),
    (r"how (?:much|large|big)(?: is| are| was| were)?(?: the)?(?: total)?(?: area| land)?(?: of)?", "area"),
    (r"(?:what (?:is|was) )?(?:the |what )?(?:total )?area(?: of)?", "area"),
    (r"where", "where"),
    (r"what|which(?: of)?|list|show(?: me)?", "what"),
    (r"is|are|was|were|did|do|does|has|have|any(?: of)?", "yes/no"),
)
FILLERS = frozenset(
    "a an the this that which there here it they is are was were be been being has have had did do does any some many "
    "and or happen happened happening changed exist exists found lie lies located located covered cover detected seen "
    "occur occurred".split()
)
WHOLE = r"(?:in|on|of|over|across) (?:the |this )?(?:whole |entire )?(?:scene|image|map|report)"
DATES = r"(?:between|from) (?:the )?(?:two |both )?(?:dates|images)|since (?:the )?(?:first|earlier) (?:date|image)"
NUMBER = r"(?P<number>\d[\d,]*(?:\.\d+)?|\.\d+)"
MORE = r"at least|(?:larger|bigger|greater|more|higher) than|over|above|exceeding|>=?|≥"
LESS = r"at most|(?:smaller|less|lower|fewer) than|under|below|up to|<=?|≤"
COMPARED = rf"(?:(?P<more>{MORE})|(?P<less>{LESS}))\s*{NUMBER}"
UNITS = {  # unit: its words, and how many of `area_m2` or `pixels` it is
    "m2": (r"m2|m²|m\^2|sqm|sq\.? ?m|square met(?:re|er)s?", 1),
    "ha": (r"ha|hectares?", SQUARE_METRES_PER_HECTARE),
    "km2": (r"km2|km²|square kilomet(?:re|er)s?", 1_000_000),
    "px": (r"px|pixels?", 1),
}
UNIT = "(?:" + "|".join(f"(?P<{unit}>{words})" for unit, (words, _) in UNITS.items()) + r")(?!\w)"
SIZE = rf"(?:(?:that|which) (?:is|are) )?(?:with )?(?:an area )?(?:of )?{COMPARED}\s*{UNIT}"
CERTAIN = r"(?:probability|confidence|certainty)"
CHANCE = rf"(?:with )?(?:a |an )?{CERTAIN} (?:of )?{COMPARED}\s*(?P<percent>%|percent)?"
SURE = (
    rf"(?:(?:that|which) (?:is|are) )?{COMPARED}\s*(?P<percent>%|percent) (?:certain|sure|likely|probable|confident)"
)
ORDER = (
    r"(?:the )?(?P<many>\d+ )?(?P<word>largest|biggest|smallest|(?:most|least) (?:certain|likely|probable|confident))"
)
PLACE = (
    r"(?:(?:in|at|on) )?(?:the )?(?:(?P<row>north|south)[- ]?(?P<column>east|west)|(?P<side>north|south|east|west)"
    r"|(?P<middle>cent(?:re|er|ral)|middle))(?:ern)?(?: (?:part|side|corner|third))?"
    r"(?: of the (?:scene|image|map))?(?! of\b)(?![\w-])"
)
SIGNED = r"-?\d+(?:\.\d+)?"
NUMBERS = rf"[(\[]?\s*(?P<numbers>{SIGNED}(?:[\s,;]+{SIGNED})+)\s*[)\]]?"
COORDINATES = rf"(?:(?:at|in|inside|within) )?(?:the )?(?:point |box )?{NUMBERS}"


@dataclass(frozen=True)
class Limit:
    """A bound on a field of `Change`: at least `low`, at most `high`; `open` excludes the bound itself."""

    field: Literal["area_m2", "pixels", "probability"]
    low: float = float("-inf")
    high: float = float("inf")
    open: bool = True
    words: str = ""


@dataclass(frozen=True)
class Question:
    """What a question asks for.

    Args:
        type: of the answer.
        labels: classes; all of the mask if none is named.
        kinds: "appeared", "removed"; every kind if empty.
        place: "north-east", "north", "centre", ...; a side means its whole third; None = everywhere.
        at: x, y of a point or left, bottom, right, top of a box, as they were written; None = everywhere.
        limits: that each change must keep.
        order: ("area", how many) of the largest, ("-area", ...) of the smallest; likewise "probability"; or None.
    """

    type: Type
    labels: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    place: str | None = None
    at: tuple[float, ...] | None = None
    limits: tuple[Limit, ...] = ()
    order: tuple[str, int] | None = None


class Rest:
    """What of a question is not understood yet."""

    def __init__(self, text: str) -> None:
        self.text = " ".join(re.sub(r"[?!:]|\.(?!\d)", " ", text.lower()).split())

    def head(self) -> Type | None:
        """Cut off how the question begins."""
        for pattern, kind in HEADS:
            if match := re.match(rf"(?:{pattern})(?!\w)", self.text):
                self.text = self.text[match.end() :].strip()
                return kind
        return None

    def cut(self, pattern: str) -> list[re.Match[str]]:
        """Cut out all that fits; a bar stands in its place, so that no phrase grows over the gap."""
        pattern = rf"(?<![\w-])(?:{pattern})(?![\w²])"
        found = list(re.finditer(pattern, self.text))
        self.text = " ".join(re.sub(pattern, " | ", self.text).split())
        return found

    def words(self) -> list[str]:
        """The words that are left."""
        return re.findall(r"[^\s|,]+", self.text)


def parse(text: str, labels: Collection[str]) -> Question:
    """Read a question.

    Args:
        text: in English.
        labels: classes of the report's mask.

    Raises:
        InputError: words that are not understood, or a class that the mask does not have; the message has examples.
    """
    rest = Rest(text)
    kind = rest.head()
    if kind is None:
        raise _not_understood(text, f"how it begins ({' '.join(rest.words()[:2])!r})")
    limits = [_size_limit(match) for match in rest.cut(SIZE)]
    limits += [_chance_limit(match) for pattern in (SURE, CHANCE) for match in rest.cut(pattern)]
    numbers = [tuple(map(float, re.findall(SIGNED, match["numbers"]))) for match in rest.cut(COORDINATES)]
    orders = [_order(match) for match in rest.cut(ORDER)]
    rest.cut(f"{WHOLE}|{DATES}|(?:any|some) of")
    places = [_place(match) for match in rest.cut(PLACE)]
    classes = CLASSES | {label: rf"{re.escape(label)}s?" for label in labels if label not in {*CLASSES, "change"}}
    any_class = "|".join(classes.values())
    rest.text = re.sub(rf"\b({any_class}) (?:changes?|changed)\b", r"\1", rest.text)  # "building changes": that class
    rest.text = re.sub(rf"\bchanges? (?:to|of|in) (?:the )?({any_class})\b", r"\1", rest.text)
    rest.text = re.sub(r"\bchange$", "", rest.text)  # "did any of the houses in the north change"
    named = tuple(label for label, pattern in classes.items() if rest.cut(pattern))
    anything = bool(rest.cut(ANYTHING))
    kinds = tuple(name for name, pattern in KINDS.items() if rest.cut(pattern))

    words = rest.words()
    if unknown := [word for word in words if word not in FILLERS]:
        raise _not_understood(text, ", ".join(unknown))
    if absent := [label for label in named if label not in labels]:
        raise InputError(f"The mask of this report has no class {absent[0]!r}; its classes: {', '.join(labels)}.")
    if not (kinds or anything or re.search("change|happen|occur", text.lower())):
        raise InputError(f"{text!r} asks what is there; a report knows what appeared, was removed, or changed.")
    if "here" in words and not numbers:
        raise _not_understood(text, "'here' without a point (x, y) or a box (left, bottom, right, top)")
    if any(len(one) not in (2, 4) for one in numbers):
        raise _not_understood(text, "numbers that are neither a point (x, y) nor a box (left, bottom, right, top)")
    if max(len(places), len(numbers), len(orders)) > 1:
        raise _not_understood(text, "more than one place or order")
    if kinds and re.search(r"\b(?:and|or) (?:were |was )?changed?\b|\bchanged? (?:and|or)\b", text.lower()):
        raise _not_understood(text, f"changed, which every change has, beside {' and '.join(kinds)}")
    most = max(len(named), len(kinds), 1)
    loose = words.count("or") >= most or ("and" in words and most == 1 and not limits)
    if loose or min(len(named), len(kinds)) > 1 or (most > 1 and not {"and", "or"} & set(words)):
        raise _not_understood(text, "what 'and' or 'or' joins: classes, or kinds of change, but not both")
    if (orders and kind in ("yes/no", "count")) or (named and anything and kind == "yes/no"):
        raise _not_understood(text, "what one certain change is, as a question of yes or no or of how many")
    place, at, order = next(iter(places), None), next(iter(numbers), None), next(iter(orders), None)
    return Question(kind, named, kinds, place, at, tuple(limits), order)


def _not_understood(text: str, what: str) -> InputError:
    return InputError(f"Not understood in {text!r}: {what}. What is, for example: {' '.join(EXAMPLES)}")


def _bound(match: re.Match[str], factor: float, field: Literal["area_m2", "pixels", "probability"]) -> Limit:
    value = float(match["number"].replace(",", "")) * factor
    word = match["more"] or match["less"]
    side = {"low": value} if match["more"] else {"high": value}
    return Limit(
        field, open=word not in ("at least", "at most", "up to", ">=", "<=", "≥", "≤"), words=match[0], **side
    )


def _size_limit(match: re.Match[str]) -> Limit:
    [unit] = [unit for unit in UNITS if match[unit]]
    return _bound(match, UNITS[unit][1], "pixels" if unit == "px" else "area_m2")


def _chance_limit(match: re.Match[str]) -> Limit:
    limit = _bound(match, 0.01 if match["percent"] else 1, "probability")
    if max(bound for bound in (limit.low, limit.high) if abs(bound) != float("inf")) > 1:
        raise InputError(f"{match[0]!r}: a probability lies between 0 and 1, or between 0 % and 100 %.")
    return limit


def _order(match: re.Match[str]) -> tuple[str, int]:
    many, word = int(match["many"] or 1), match["word"]
    field = "area" if word in ("largest", "biggest", "smallest") else "probability"
    return ("-" if word == "smallest" or word.startswith("least") else "") + field, many


def _place(match: re.Match[str]) -> str:
    return f"{match['row']}-{match['column']}" if match["row"] else match["side"] or "centre"
