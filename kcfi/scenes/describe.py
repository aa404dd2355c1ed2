"""`describe_scene`: georeferenced images of one place at two dates -> `Findings`, and the rasters behind them."""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import torch
from PIL import Image
from shapely.geometry.base import BaseGeometry
from tqdm import tqdm

from kcfi.models import embedded_model, load
from kcfi.processing import NO_LABEL, Describer, InputError
from kcfi.processing.places_kcfi import tells_of_change
from kcfi.scenes.dates import coarse_dates, describe_dates, far_dates, fingerprint
from kcfi.scenes.findings import Change, Date, Findings, Grid
from kcfi.scenes.grid import pixel_areas, scene_grid
from kcfi.scenes.kept import Kept
from kcfi.scenes.rasters import CACHE, NewRaster
from kcfi.scenes.reading import Layer, open_raster
from kcfi.scenes.regions import Region, find_regions, polygons
from kcfi.scenes.registration import estimate_shift
from kcfi.scenes.sentences import kind_of, place_of, plain_sentence, scene_caption, write_sentences
from kcfi.scenes.tiles import Strip, detect
from kcfi.scenes.writers import write_findings

WORK = ".work"  # folder in the output for rasters on the way, and what is kept of a run that was stopped
RESOLUTION = 0.5  # m per pixel, of a model that does not say at what it was trained
OVERVIEW = 2048  # px: longest side of the small pictures of the dates
LABELS = {2: {1: "change"}, 3: {1: "road", 2: "building"}}  # by number of classes


def describe_scene(
    dates: Sequence[str | Path],
    output: str | Path,
    model: str | Describer = "kcfi-tiny",
    *,
    reproject: bool = False,
    align: bool = False,
    bands: Sequence[int] | None = None,
    stretch: Sequence[float] | None = None,
    min_area: float = 25.0,
    max_captions: int | None = None,
    model_resolution: float | None = None,
    acquired: Sequence[str] = (),
) -> Findings:
    """Find what changed between the dates of a scene of any size, and say it.

    A run that was stopped and is started again with the same settings goes on where it was, and ends with the same
    files.

    Args:
        dates: files of the earlier and the later date: GeoTIFFs or whatever else GDAL reads, or plain images.
        output: folder for the results.
        model: name of a model, or a `Describer` where more than the name matters (device, batch size, instruction).
        reproject: take dates of different CRS; all are brought to that of the first.
        align: take out a constant shift between the dates before they are compared.
        bands: which are red, green and blue, counted from 1.
        stretch: percentiles that become black and white; None = of other than 8 bits 2 and 98, else none.
        min_area: smallest region that is a change, in m2; without coordinates at `model_resolution` m per pixel.
        max_captions: how many regions, from the largest, get a sentence of the model; None = all.
        model_resolution: m per pixel that the model was trained at; None = as saved with it, else `RESOLUTION`.
        acquired: when the dates were acquired, ISO 8601; empty = as the files say it, if they do.

    Raises:
        FileNotFoundError: no such file.
        InputError: dates that cannot be compared, a setting that is wrong, or a model without a change detection head.
    """
    if len(dates) != 2:
        raise InputError(f"A scene has two dates, an earlier and a later one; got {len(dates)}.")
    if acquired and len(acquired) != len(dates):
        raise InputError(f"acquired names {len(acquired)} dates for {len(dates)} images: give one each.")
    describer = model if isinstance(model, Describer) else Describer(*load(model))
    if describer.model.model.change_detection_head is None:
        raise InputError("This model has no change detection head: it cannot find changes in a scene.")
    warnings = []
    resolution = describer.processor.ground_sampling_distance if model_resolution is None else model_resolution
    if resolution is None:
        resolution = RESOLUTION
        warnings.append(f"The model does not say at how many m per pixel it was trained; {RESOLUTION} was taken.")
    if resolution <= 0 or (max_captions or 0) < 0:
        raise InputError(
            f"model_resolution={resolution} must be above 0, and max_captions={max_captions} not below it."
        )
    name = describer.model.name_or_path
    settings: dict[str, Any] = {
        "model": "kcfi-tiny" if name == embedded_model() else name,
        "revision": getattr(describer.model.config, "_commit_hash", None),
        "weights": digest(describer.model),
        "instruction": describer.instruction,
        "tile_px": describer.view,
        "temperature": describer.calibration.temperature,
        "model_resolution_m": resolution,
        "bands": None if bands is None else list(bands),
        "stretch": None if stretch is None else list(stretch),
        "reproject": reproject,
        "align": align,
    }
    labels = LABELS[describer.model.config.num_change_classes]
    work = Path(output) / WORK
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=CACHE))
        sources = [stack.enter_context(open_raster(path)) for path in dates]
        grid = scene_grid(sources, resolution, reproject)
        before, after = (Layer(source, grid, bands, stretch) for source in sources)
        shift = estimate_shift(before, after, grid)
        if align and shift.windows:
            shift = replace(shift, aligned=True)
            after = Layer(sources[1], grid, bands, stretch, (shift.x, shift.y))
        warnings += [*coarse_dates(sources, resolution), *far_dates(dates, shift)]
        described = describe_dates(dates, sources, (before, after), acquired)
        record = {**settings, "inputs": [fingerprint(path) for path in dates], "shift": [shift.x, shift.y]}
        least = min_area / (resolution**2 if grid.crs is None else 1)
        found = compare(describer, before, after, work, record, list(labels), least, max_captions)
        for number, layer in enumerate((before, after)):
            Image.fromarray(layer.overview(OVERVIEW)[0]).save(work / f"date-{number}.png")
    changes = list_changes(found, grid, labels, described)
    findings = Findings(
        caption=scene_caption(changes),
        grid=grid,
        dates=described,
        shifts=(shift,),
        changes=changes,
        seen_pixels=found.seen,
        labels=labels,
        settings={**settings, "min_area_m2": min_area, "max_captions": max_captions},
        versions={name: version(name) for name in ("kcfi", "torch", "transformers", "rasterio")},
        warnings=tuple(warnings),
    )
    write_findings(findings, work, Path(output))
    return findings


class Compared(NamedTuple):
    """What differs between two dates; the rasters lie in the folder of `compare`."""

    seen: int  # pixels that both have data for
    regions: list[Region]
    outlines: dict[int, BaseGeometry]  # by `Region.number`
    sentences: list[str]  # of the first regions


def compare(
    describer: Describer,
    before: Layer,
    after: Layer,
    work: Path,
    record: dict[str, Any],
    labels: Sequence[int],
    least: float,
    most_captions: int | None,
) -> Compared:
    """Detect, number, outline and describe what changed between two dates on one grid.

    Args:
        describer: does it.
        before: the earlier date.
        after: the later one.
        work: folder for `mask.tif` (class ids), `probability.tif` (percent), `regions.tif` (`Region.number`), and what
            is kept.
        record: what the mask depends on, see `Kept`.
        labels: the classes.
        least: smallest area of a region, in m2; in px without a CRS.
        most_captions: how many regions get a sentence; None = all.

    Raises:
        InputError: no pixel has data on both dates.
    """
    grid = before.grid
    kept = Kept(work / "strips", {**record, "autocast": str(describer.autocast)})
    if kept.anew:
        tqdm.write(f"{work}: what is kept there is of other images or settings; started anew.", file=sys.stderr)
    seen = write_rasters(detect(describer, before, after, grid, kept), grid, work)
    if not seen:
        raise InputError(f"{before.source.name} and {after.source.name} have no pixel with data on both.")
    mask, probability, numbers = (work / f"{name}.tif" for name in ("mask", "probability", "regions"))
    areas = pixel_areas(grid)
    areas = np.ones(grid.height) if areas is None else areas
    regions = find_regions(mask, probability, numbers, grid, labels, areas, least)
    told = {**record, "least": least, "batch_size": describer.batch_size, "generation": str(describer.generation)}
    kept = Kept(work / "sentences", told | {"most_captions": most_captions})
    sentences = write_sentences(describer, before, after, regions[:most_captions], numbers, grid, kept)
    return Compared(seen, regions, polygons(numbers, grid), sentences)


def write_rasters(strips: Iterable[Strip], grid: Grid, work: Path) -> int:
    """Write `mask.tif` and `probability.tif` (percent); returns how many pixels every date has data for."""
    seen = 0
    with (
        NewRaster(work / "mask.tif", grid, "uint8", NO_LABEL) as mask,
        NewRaster(work / "probability.tif", grid, "uint8", NO_LABEL, 0.01) as probability,
    ):
        for strip in strips:
            mask.write(strip["mask"])
            probability.write(strip["probability"])
            seen += int((strip["mask"] != NO_LABEL).sum())
    return seen


def list_changes(found: Compared, grid: Grid, labels: dict[int, str], dates: Sequence[Date]) -> tuple[Change, ...]:
    """Regions with their outlines and sentences; those whose sentence tells of no change get that of the mask."""
    changes = []
    for region, sentence in zip_longest(found.regions, found.sentences):
        label, place = labels[region.label], place_of(region.centre, grid)
        caption = sentence if sentence and tells_of_change(sentence) else plain_sentence(label, place)
        changes.append(
            Change(
                id=region.number,
                label=label,
                kind=kind_of(caption, label),
                polygon=found.outlines[region.number],
                pixels=region.pixels,
                area_m2=None if grid.crs is None else region.area,
                probability=region.probability,
                caption=caption,
                place=place,
                box=region.box,
                before=dates[0].name,
                after=dates[1].name,
                first_seen=dates[1].name,
            )
        )
    return tuple(changes)


def digest(model: torch.nn.Module) -> str:
    """A name for a model's weights: they differ, so does it."""
    sums = [float(weights.detach().double().sum()) for weights in model.parameters()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]
