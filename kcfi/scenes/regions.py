"""Changed regions of a mask that is read in strips: their numbers, measures and polygons.

A region is what `processing.describer_kcfi.changed_regions` calls one, for each class by itself, so that the areas of
classes are those of the mask: pixels of one class, gaps of up to twice `MERGE` px bridged. Components of neighbouring
strips that touch are one (union-find).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio import features
from rasterio.windows import Window
from scipy import ndimage
from shapely import affinity
from shapely.geometry import MultiPolygon, shape
from shapely.geometry.base import BaseGeometry

from kcfi.processing.describer_kcfi import MERGE
from kcfi.processing.places_kcfi import Box
from kcfi.scenes.findings import Grid
from kcfi.scenes.rasters import NewRaster
from kcfi.scenes.reading import open_raster

LINES = 256  # of a strip: what is changed in one takes 80 bytes a pixel
TOLERANCE = 1.0  # px that the outline of a polygon may be off by
SUMS = ("pixels", "area", "probability", "x", "y")  # columns of `_measures`, before the box


@dataclass(frozen=True)
class Region:
    """A changed region.

    Args:
        number: from 1, by area from the largest; the value of its pixels in the raster of regions.
        label: value of its class in the mask.
        pixels: how many there are.
        area: in the unit of the areas of pixels that were given: m2, or px.
        probability: mean, 0 to 1.
        box: in pixels of the grid.
        centre: mean of its pixels, x and y in pixels of the grid.
    """

    number: int
    label: int
    pixels: int
    area: float
    probability: float
    box: Box
    centre: tuple[float, float]


def find_regions(
    mask: Path, probability: Path, output: Path, grid: Grid, labels: Sequence[int], areas: NDArray[Any], least: float
) -> list[Region]:
    """Find the changed regions, and write which of them every pixel belongs to.

    Args:
        mask: raster of class ids.
        probability: raster of percent.
        output: raster to write, without a place on the ground: `Region.number`, 0 = none.
        grid: of the rasters.
        labels: the classes.
        areas: of a pixel, for each row (H,).
        least: smallest area of a region, in the unit of `areas`.

    Returns:
        The regions, by area from the largest.
    """
    with open_raster(mask) as classes, open_raster(probability) as percents:
        components = _Components(classes, labels)
        parts = [
            _measures(top, numbers, percents.read(1, window=Window(0, top, *numbers.shape[::-1])), areas)
            for top, numbers in components.strips()
        ]
        regions, final = _joined(np.concatenate(parts), components, least)
        with NewRaster(output, replace(grid, crs=None), "int32", by_lines=True) as raster:
            for _, numbers in components.strips():
                raster.write(final[numbers])
    return regions


class _Components:
    """Connected components of a raster, with provisional numbers: one component has several in several strips."""

    def __init__(self, classes: Any, labels: Sequence[int]) -> None:
        self.classes, self.labels = classes, labels
        self.parents, self.label_of = [0], [0]  # by provisional number; 0 = no component

    def strips(self) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """First line and provisional numbers (h, W) of the changed pixels of each strip; each time the same."""
        width, height = self.classes.width, self.classes.height
        above: dict[int, NDArray[np.int32]] = {}  # by class: the last line of the strip before, gaps bridged
        count = 0
        for top in range(0, height, LINES):
            first, last = max(0, top - MERGE), min(height, top + LINES + MERGE)
            mask = self.classes.read(1, window=Window(0, first, width, last - first))
            lines = slice(top - first, top - first + min(LINES, height - top))
            numbers = np.zeros((lines.stop - lines.start, width), np.int32)
            for label in self.labels:
                changed = mask == label
                bridged = ndimage.maximum_filter(changed, 2 * MERGE + 1, mode="constant")[lines]
                found, more = ndimage.label(bridged, output=np.int32)
                found[bridged] += count
                if count + more >= len(self.parents):
                    self.parents += range(len(self.parents), count + more + 1)
                    self.label_of += [label] * (len(self.parents) - len(self.label_of))
                if top:
                    self._unite(above[label], found[0])
                above[label], count = found[-1].copy(), count + more
                numbers += found * changed[lines]
            yield top, numbers

    def root(self, number: int) -> int:
        """The smallest provisional number of a component."""
        while self.parents[number] != number:
            self.parents[number] = number = self.parents[self.parents[number]]
        return number

    def _unite(self, above: NDArray[np.int32], below: NDArray[np.int32]) -> None:
        touching = (above > 0) & (below > 0)
        for pair in np.unique(np.stack([above[touching], below[touching]]), axis=1).T.tolist():
            one, other = sorted(map(self.root, pair))
            self.parents[other] = one


def _measures(top: int, numbers: NDArray[np.int32], percent: NDArray[np.uint8], areas: NDArray[Any]) -> NDArray[Any]:
    """Rows of number, `SUMS`, left, top, -right, -bottom: one for every provisional number of a strip."""
    rows, columns = np.nonzero(numbers)
    present, places = np.unique(numbers[rows, columns], return_inverse=True)
    x, y = columns + 0.5, rows + top + 0.5
    values = (np.ones(len(rows)), areas[rows + top], percent[rows, columns] / 100, x, y)
    sums = [np.bincount(places, each, len(present)) for each in values]
    box = np.full((4, len(present)), np.inf)
    for side, ends in zip(box, (columns, rows + top, -columns - 1, -rows - top - 1), strict=True):
        np.minimum.at(side, places, ends)
    return np.stack([present, *sums, *box], axis=1)


def _joined(parts: NDArray[Any], components: _Components, least: float) -> tuple[list[Region], NDArray[np.int32]]:
    """`_measures` of all strips -> the regions, and provisional number -> `Region.number`."""
    roots = np.array([components.root(number) for number in range(len(components.parents))])
    present, places = np.unique(roots[parts[:, 0].astype(int)], return_inverse=True)
    sums, box = np.zeros((len(present), len(SUMS))), np.full((len(present), 4), np.inf)
    np.add.at(sums, places, parts[:, 1 : 1 + len(SUMS)])
    np.minimum.at(box, places, parts[:, 1 + len(SUMS) :])
    large = [index for index in range(len(present)) if sums[index, 1] >= least]
    large.sort(key=lambda index: (-sums[index, 1], box[index, 1], box[index, 0], present[index]))
    regions, final = [], np.zeros(len(roots), np.int32)
    for number, index in enumerate(large, start=1):
        pixels, area, probability, x, y = sums[index]
        left, top, right, bottom = (abs(int(side)) for side in box[index])
        label = components.label_of[present[index]]
        middle = float(x / pixels), float(y / pixels)
        mean = float(probability / pixels)
        regions.append(Region(number, label, int(pixels), float(area), mean, (left, top, right, bottom), middle))
        final[present[index]] = number
    return regions, final[roots]


def polygons(regions: Path, grid: Grid) -> dict[int, BaseGeometry]:
    """Outlines of all regions, by `Region.number`, in coordinates of the grid, simplified to the pixel.

    GDAL reads the raster line by line; what is in memory is the outlines.
    """
    parts = defaultdict(list)
    with open_raster(regions) as numbers:
        for outline, number in features.shapes(rasterio.band(numbers, 1)):
            if number:
                parts[int(number)].append(shape(outline))
    place = grid.transform
    matrix = (place.a, place.b, place.d, place.e, place.c, place.f)
    return {number: affinity.affine_transform(_simple(parts[number]), matrix) for number in sorted(parts)}


def _simple(parts: list[BaseGeometry]) -> BaseGeometry:
    """A valid outline within a pixel of the given ones, which run along the edges of pixels."""
    exact = parts[0] if len(parts) == 1 else MultiPolygon(parts)  # type: ignore[arg-type]
    simple = exact.simplify(TOLERANCE)
    return simple if simple.is_valid and not simple.is_empty else exact
