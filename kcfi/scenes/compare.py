"""Dates on one grid -> what differs between them: rasters, regions, outlines, sentences."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from shapely.geometry.base import BaseGeometry
from tqdm import tqdm

from kcfi.processing import NO_LABEL, Describer, InputError
from kcfi.scenes.grid import pixel_areas
from kcfi.scenes.kept import Kept
from kcfi.scenes.rasters import NewRaster
from kcfi.scenes.reading import Layer
from kcfi.scenes.regions import Region, find_regions, polygons
from kcfi.scenes.sentences import write_sentences
from kcfi.scenes.series import Pair, date_regions, join, pairs
from kcfi.scenes.tiles import detect


class Compared(NamedTuple):
    """What differs between the dates; the rasters lie in the folder of `compare`."""

    seen: int  # pixels that all dates have data for
    regions: list[Region]
    outlines: dict[int, BaseGeometry]  # by `Region.number`
    shown: list[Pair]  # numbers of the dates that show each region
    sentences: dict[int, str]  # by `Region.number`


def compare(
    describer: Describer,
    layers: Sequence[Layer],
    work: Path,
    settings: dict[str, Any],
    inputs: Sequence[Any],
    labels: Sequence[int],
    least: float,
    most_captions: int | None,
    confirm: int,
    between: Callable[[], None] = lambda: None,
) -> Compared:
    """Detect, number, outline and describe what changed between dates on one grid.

    Args:
        describer: does it.
        layers: the dates.
        work: folder for `mask.tif` (class ids), `probability.tif` (percent), `regions.tif` (`Region.number`), and what
            is kept; of more than two dates also for those of each pair.
        settings: what the mask depends on beside the dates, see `Kept`.
        inputs: what tells the dates from others.
        labels: the classes.
        least: smallest area of a region, in m2; in px without a CRS.
        most_captions: how many regions get a sentence; None = all.
        confirm: see `describe_scene`.
        between: see `describe_scene`.

    Raises:
        InputError: no pixel has data on all dates.
    """
    grid, count = layers[0].grid, len(layers)
    folders = {pair: work / f"{pair[0] + 1}-{pair[1] + 1}" if count > 2 else work for pair in pairs(count)}
    place = [str(grid.crs), grid.transform[:6], grid.width, grid.height]
    settings = {**settings, "grid": place, "autocast": str(describer.autocast)}
    for (one, other), folder in folders.items():
        kept = Kept(folder / "strips", {**settings, "inputs": [inputs[one], inputs[other]]})
        seen = mark(describer, layers[one], layers[other], folder, kept)
    if count > 2:
        seen = join([folders[0, later] for later in range(1, count)], grid, confirm, work)
    if not seen:
        raise InputError("These dates have no pixel with data on all of them.")
    areas = pixel_areas(grid)
    areas = np.ones(grid.height) if areas is None else areas
    mask, probability, numbers = (work / f"{name}.tif" for name in ("mask", "probability", "regions"))
    between()
    regions = find_regions(mask, probability, numbers, grid, labels, areas, least)
    shown = date_regions(numbers, len(regions), folders, grid, work) if count > 2 else [(0, 1)] * len(regions)
    told = {**settings, "inputs": inputs, "confirm": confirm, "least": least}
    told |= {"batch_size": describer.batch_size, "generation": str(describer.generation)}
    sentences: dict[int, str] = {}
    between()
    for pair, folder in folders.items():
        own = [one for one, by in zip(regions[:most_captions], shown, strict=False) if by == pair]
        kept = Kept(folder / "sentences", told | {"regions": [one.number for one in own]})
        written = write_sentences(describer, layers[pair[0]], layers[pair[1]], own, numbers, grid, kept)
        sentences |= dict(zip([one.number for one in own], written, strict=True))
    between()
    return Compared(seen, regions, polygons(numbers, grid), shown, sentences)


def mark(describer: Describer, before: Layer, after: Layer, folder: Path, kept: Kept) -> int:
    """Write `mask.tif` and `probability.tif` (percent) of a pair; returns how many pixels both have data for.

    Raises:
        InputError: none.
    """
    if kept.anew:
        tqdm.write(f"{folder}: what is kept there is of other images or settings; started anew.", file=sys.stderr)
    seen, grid = 0, before.grid
    with (
        NewRaster(folder / "mask.tif", grid, "uint8", NO_LABEL) as mask,
        NewRaster(folder / "probability.tif", grid, "uint8", NO_LABEL, 0.01) as probability,
    ):
        for strip in detect(describer, before, after, grid, kept):
            mask.write(strip["mask"])
            probability.write(strip["probability"])
            seen += int((strip["mask"] != NO_LABEL).sum())
    if not seen:
        raise InputError(f"{before.source.name} and {after.source.name} have no pixel with data on both.")
    return seen
