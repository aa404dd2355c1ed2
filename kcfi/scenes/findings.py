"""What `describe_scene` finds: the data that passes from detection to the writers and the report.

Everything is plain data, so that `summary.json` holds all of it and `kcfi ask` can read it back.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from affine import Affine
from rasterio.crs import CRS
from shapely.geometry.base import BaseGeometry

Kind = Literal["appeared", "removed", "changed"]  # "changed": the sentence does not say which way


@dataclass(frozen=True)
class Grid:
    """The grid on which all dates are compared: that of the first date, cut to what all dates cover.

    Args:
        crs: of the coordinates; None = pixels of a plain image (x to the right, y down).
        transform: pixel (column, row) -> coordinates.
        width: in pixels.
        height: in pixels.
        metres: width and height of a pixel on the ground in m, at the scene's centre; None without a CRS.
    """

    crs: CRS | None
    transform: Affine
    width: int
    height: int
    metres: tuple[float, float] | None


@dataclass(frozen=True)
class Date:
    """One date of a scene.

    Args:
        path: the file, as it was given.
        name: what the report calls it: the acquisition date where the file or caller says it, else the file's stem.
        acquired: ISO 8601 date, "" where nobody says it.
        notes: what was done to bring it onto the grid ("resampled from 0.30 to 0.50 m/px", "shifted by half a pixel").
    """

    path: str
    name: str
    acquired: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shift:
    """How far a date lies from the one it is compared with, estimated on textured windows (`registration.py`).

    Args:
        x: median over the windows, px of the grid to the right.
        y: the same, down.
        spread: median absolute deviation of the windows' shifts, px.
        windows: how many windows had enough texture; 0 = not estimated, x and y are 0.
        aligned: whether the shift was taken out before the comparison (`--align`).
    """

    x: float
    y: float
    spread: float
    windows: int
    aligned: bool = False


@dataclass(frozen=True)
class Change:
    """A changed region.

    Args:
        id: from 1, by area from the largest.
        label: class of the mask: "building", "road", or "change" for a model of one class.
        kind: read from the sentence.
        polygon: in coordinates of the grid's CRS (pixels without one), valid, simplified to the pixel.
        pixels: how many of the grid's pixels changed.
        area_m2: measured on the mask; None without a CRS.
        probability: mean probability of change over its pixels, 0 to 1.
        caption: its sentence; places are compass directions in the scene.
        place: where it lies in the scene: "north-west", "centre", ... (image up is north where there is no CRS).
        box: (left, top, right, bottom) in pixels of the grid.
        before: `Date.name` of the date that `after` is compared with: the one before it, or the first.
        after: `Date.name` of the date on which the sentence sees it.
        first_seen: `Date.name` of the first date that shows it.
    """

    id: int
    label: str
    kind: Kind
    polygon: BaseGeometry
    pixels: int
    area_m2: float | None
    probability: float
    caption: str
    place: str
    box: tuple[int, int, int, int]
    before: str
    after: str
    first_seen: str


@dataclass(frozen=True)
class Findings:
    """A described scene.

    Args:
        caption: a sentence for the whole scene, made of counts and places of `changes`, not by the language model.
        grid: of all rasters and polygons.
        dates: in order of time.
        shifts: of each date but the first, from the first.
        changes: by area from the largest.
        seen_pixels: pixels that every date covers with data; masks and areas count these alone.
        labels: the classes of the mask by value: {1: "road", 2: "building"}.
        settings: everything that the result depends on: model and its revision, tile, thresholds, bands, stretch.
        versions: of kcfi, torch, transformers, rasterio.
        warnings: sentences that the reader of the report must see.
    """

    caption: str
    grid: Grid
    dates: tuple[Date, ...]
    shifts: tuple[Shift, ...]
    changes: tuple[Change, ...]
    seen_pixels: int
    labels: dict[int, str]
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
