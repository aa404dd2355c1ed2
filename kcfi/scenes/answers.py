"""A question and the polygons of a report -> the answer with the numbers that prove it. No model is asked."""

import warnings
from collections import Counter
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import geopandas
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window
from shapely import Point, box
from shapely.affinity import affine_transform, scale
from shapely.geometry.base import BaseGeometry

from kcfi.processing import NO_LABEL, InputError, refusing
from kcfi.scenes.findings import Change, Findings
from kcfi.scenes.questions import FIELDS, Limit, Question, parse
from kcfi.scenes.report import area_text
from kcfi.scenes.summary import coverage, crs_name, on_earth, read_summary, size

LON_LAT = "EPSG:4326"
SHOWN = 20  # changes that a text lists; the JSON has all
SAMPLED = 256  # px: side of the reduced mask on which the seen share of a box is measured


@dataclass(frozen=True)
class Answer:
    """An answer.

    Args:
        question: as it was asked.
        type: "yes/no", "count", "area", "where" or "what".
        value: bool; number; m2 (pixels without a CRS); changes by place; changes by id: their sentences.
        text: the answer in words, one or more lines.
        sought: what was understood, in words.
        ids: of the changes that were counted, from the largest.
        size: `count`, `pixels`, `area_m2`, `area_ha` of these.
        notes: what limits the answer: parts that were not seen, sentences that do not say which way a change went.
    """

    question: str
    type: str
    value: Any
    text: str
    sought: str
    ids: list[int]
    size: dict[str, Any]
    notes: list[str]


def ask(folder: Path, text: str) -> Answer:
    """Answer a question from a report.

    Args:
        folder: of `write_findings`.
        text: the question, in English.

    Raises:
        InputError: no report, a question that is not understood, or a place outside of the scene.
    """
    findings = read_summary(folder)
    question = parse(text, list(findings.labels.values()))
    if findings.grid.crs is None and any(limit.field == "area_m2" for limit in question.limits):
        raise InputError(
            "The images of this report have no CRS, so areas are in pixels: ask for 'larger than 500 px'."
        )
    spot, where = _spot(question, findings)
    others = [one for one in findings.changes if _fits(one, question, spot)]
    changes = [one for one in others if one.kind in question.kinds or not question.kinds]
    if question.order:
        changes = _first(changes, *question.order)
    notes = _notes(folder / "mask.tif", findings, spot)
    undecided = [one.id for one in others if one.kind == "changed"] if question.kinds else []
    if undecided:
        notes.append(f"{_changes(undecided)} would fit, but the sentence does not say which way.")
    sought = _sought(question, where)
    value, text_of_answer = _answer(question, changes, findings)
    if spot is not None and not changes and findings.changes:
        notes.append(_nearest(spot, findings))
    lines = [text_of_answer, f"Sought: {sought}.", *notes]
    return Answer(
        text,
        question.type,
        value,
        "\n".join(lines),
        sought,
        [one.id for one in changes],
        size(findings, changes),
        notes,
    )


def _fits(change: Change, question: Question, spot: BaseGeometry | None) -> bool:
    """Whether a change is what a question asks for, whatever its kind."""
    return (
        (change.label in question.labels or not question.labels)
        and (not question.place or change.place in FIELDS[question.place])
        and (spot is None or change.polygon.intersects(spot))
        and all(_within(getattr(change, limit.field), limit) for limit in question.limits)
    )


def _within(value: float, limit: Limit) -> bool:
    return limit.low < value < limit.high if limit.open else limit.low <= value <= limit.high


def _first(changes: list[Change], order: str, many: int) -> list[Change]:
    """The largest, smallest, most or least certain of some changes."""
    field = "pixels" if order.endswith("area") else "probability"
    sign = 1 if order.startswith("-") else -1
    return sorted(changes, key=lambda one: (sign * getattr(one, field), one.id))[:many]


def _spot(question: Question, findings: Findings) -> tuple[BaseGeometry | None, str]:
    """The point or box of a question in coordinates of the grid, and in words how it was read.

    Numbers are coordinates of the grid's CRS if they lie in the scene as such, else longitude and latitude.
    """
    if not question.at:
        return None, ""
    grid, numbers = findings.grid, question.at
    point = len(numbers) == 2
    left, bottom, right, top = (*numbers, *numbers) if point else numbers
    shape = Point(numbers) if point else box(min(left, right), min(bottom, top), max(left, right), max(bottom, top))
    scene = affine_transform(box(0, 0, grid.width, grid.height), grid.transform.to_shapely())
    readings = [(shape, crs_name(grid.crs))]
    if on_earth(grid.crs) and all(abs(x) <= 180 for x in (left, right)) and all(abs(y) <= 90 for y in (bottom, top)):
        readings.append((geopandas.GeoSeries([shape], crs=LON_LAT).to_crs(grid.crs)[0], "longitude, latitude"))
    said = (
        f"{'point' if point else 'box'} {', '.join(f'{one:g}' if abs(one) < 1e5 else f'{one:.1f}' for one in numbers)}"
    )
    for reading, name in readings:
        if reading.intersects(scene):
            return reading, f"{said} ({name})"
    x0, y0, x1, y1 = scene.bounds
    raise InputError(
        f"The {said} lies outside of the scene, which reaches from {x0:.10g} to {x1:.10g} and from {y0:.10g} to "
        f"{y1:.10g} ({crs_name(grid.crs)}). x or longitude comes first."
    )


def _notes(mask: Path, findings: Findings, spot: BaseGeometry | None) -> list[str]:
    """What the dates do not show: of the point or the box, else of the scene."""
    seen, whole = coverage(findings), "the scene"
    if spot is not None:
        whole = "this point" if isinstance(spot, Point) else "this box"
        seen = _seen(mask, affine_transform(spot, (~findings.grid.transform).to_shapely()))
    return [] if seen == 1 else [f"{seen:.1%} of {whole} was seen at every date; nothing is known of the rest."]


def _seen(mask: Path, spot: BaseGeometry) -> float:
    """The share of a point or a box, in pixels of the mask, that every date covers with data."""
    with refusing(f"{mask}: cannot be read as the mask of the report"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # of plain images
        with rasterio.open(mask, driver="GTiff") as file:
            left, top, right, bottom = spot.bounds
            x, y = min(max(int(left), 0), file.width - 1), min(max(int(top), 0), file.height - 1)
            width, height = (min(ceil(right), file.width) - x, min(ceil(bottom), file.height) - y)
            window = Window(x, y, max(width, 1), max(height, 1))
            shape = (min(int(window.height), SAMPLED), min(int(window.width), SAMPLED))
            return float((file.read(1, window=window, out_shape=shape) != NO_LABEL).mean())


def _nearest(spot: BaseGeometry, findings: Findings) -> str:
    """The change that lies nearest to a place without one, measured on the ground."""
    metres, transform = findings.grid.metres, ~findings.grid.transform

    def measured(shape: BaseGeometry) -> BaseGeometry:  # in m, or in px without a CRS
        return scale(affine_transform(shape, transform.to_shapely()), *metres or (1, 1), origin=(0, 0))

    distances = [(measured(one.polygon).distance(measured(spot)), one.id) for one in findings.changes]
    distance, nearest = min(distances)
    return f"The nearest change of any class and kind is {nearest}, {distance:,.0f} {'m' if metres else 'px'} away."


def _sought(question: Question, where: str) -> str:
    parts = ["class " + " or ".join(question.labels) if question.labels else "every class"]
    parts.append("kind " + " or ".join(question.kinds) if question.kinds else "every kind")
    if question.place:
        fields = FIELDS[question.place]
        parts.append(f"in the {question.place}" + (f" ({', '.join(fields)})" if len(fields) > 1 else ""))
    parts += [where] * bool(where) + [limit.words for limit in question.limits]
    if question.order:
        names = {
            "area": "largest",
            "-area": "smallest",
            "probability": "most certain",
            "-probability": "least certain",
        }
        field, many = question.order
        parts.append(f"the {f'{many} ' if many > 1 else ''}{names[field]} of these")
    return ", ".join(parts)


def _answer(question: Question, changes: list[Change], findings: Findings) -> tuple[Any, str]:
    """The value of an answer and its first lines."""
    whole = size(findings, changes)
    proof = f"{_changes([one.id for one in changes])}, {area_text(whole)}" if changes else ""
    if question.type == "yes/no":
        return bool(changes), f"Yes: {proof}." if changes else "No."
    if question.type == "count":
        return len(changes), f"{len(changes)}" + (f": {proof}." if changes else ".")
    if question.type == "area":
        value = whole["pixels"] if findings.grid.crs is None else whole["area_m2"]
        return value, f"{area_text(whole)}" + (f": {_changes([one.id for one in changes])}." if changes else ".")
    if not changes:
        return {}, "Nothing."
    if question.type == "where":
        places = Counter(one.place for one in changes)
        head = "; ".join(f"{place}: {count}" for place, count in places.most_common())
        return dict(places), "\n".join([head, *_listed(changes, lambda one: _position(one, findings))])
    sentences = {one.id: one.caption for one in changes}
    return sentences, "\n".join([proof, *_listed(changes, lambda one: one.caption)])


def _listed(changes: list[Change], what: Any) -> list[str]:
    """A line per change."""
    lines = [
        f"  {one.id}: {one.label} {one.kind}, {one.place}, {area_text(vars(one))}, probability {one.probability:.2f}: "
        f"{what(one)}"
        for one in changes[:SHOWN]
    ]
    return lines + [f"  and {len(changes) - SHOWN} more"] * (len(changes) > SHOWN)


def _position(change: Change, findings: Findings) -> str:
    point = change.polygon.representative_point()
    return f"at {point.x:.10g}, {point.y:.10g} ({crs_name(findings.grid.crs)})"


def _changes(ids: list[int]) -> str:
    """How many, and which: "3 changes (1, 4, 7)"."""
    more = ", ..." if len(ids) > SHOWN else ""
    return f"{len(ids):,} change{'' if len(ids) == 1 else 's'} ({', '.join(map(str, ids[:SHOWN]))}{more})"
