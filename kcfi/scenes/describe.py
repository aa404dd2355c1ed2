"""`describe_scene`: georeferenced images of one place at two dates -> `Findings`, and the rasters behind them."""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

import numpy as np
import rasterio
import torch
from PIL import Image
from shapely.geometry.base import BaseGeometry
from tqdm import tqdm

from kcfi.models import load
from kcfi.processing import NO_LABEL, Describer, InputError
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
    resolution = model_resolution or describer.processor.ground_sampling_distance
    if resolution is None:
        resolution = RESOLUTION
        warnings.append(f"The model does not say at how many m per pixel it was trained; {RESOLUTION} was taken.")
    labels = LABELS[describer.model.config.num_change_classes]
    work = Path(output) / WORK
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=CACHE))
        sources = [stack.enter_context(open_raster(path)) for path in dates]
        grid = scene_grid(sources, resolution, reproject)
        warnings += coarse_dates(sources, resolution)
        before, after = (Layer(source, grid, bands, stretch) for source in sources)
        shift = estimate_shift(before, after, grid)
        if align and shift.windows:
            shift = replace(shift, aligned=True)
            after = Layer(sources[1], grid, bands, stretch, (shift.x, shift.y))
        warnings += far_dates(dates, shift)

        settings = {
            "model": "given as an object" if isinstance(model, Describer) else model,
            "revision": getattr(describer.model.config, "_commit_hash", None),
            "weights": digest(describer.model),
            "tile_px": describer.view,
            "model_resolution_m": resolution,
            "bands": None if bands is None else list(bands),
            "stretch": None if stretch is None else list(stretch),
            "reproject": reproject,
            "align": align,
        }
        record = {**settings, "inputs": [fingerprint(path) for path in dates], "shift": [shift.x, shift.y]}
        kept = Kept(work / "strips", {**record, "autocast": str(describer.autocast)})
        if kept.anew:
            tqdm.write(f"{work}: what is kept there is of other images or settings; started anew.", file=sys.stderr)
        seen = write_rasters(detect(describer, before, after, grid, kept), grid, work)
        if not seen:
            raise InputError(f"{dates[0]} and {dates[1]} have no pixel with data on both.")

        areas = pixel_areas(grid)
        least = min_area if areas is not None else min_area / resolution**2
        files = work / "mask.tif", work / "probability.tif", work / "regions.tif"
        regions = find_regions(*files, grid, list(labels), np.ones(grid.height) if areas is None else areas, least)
        settings |= {"min_area_m2": min_area, "max_captions": max_captions, "instruction": describer.instruction}
        told = {**record, **settings, "batch_size": describer.batch_size, "generation": str(describer.generation)}
        sentences = write_sentences(
            describer, before, after, regions[:max_captions], files[2], grid, Kept(work / "sentences", told)
        )
        for number, layer in enumerate((before, after)):
            Image.fromarray(layer.overview(OVERVIEW)[0]).save(work / f"date-{number}.png")
        described = describe_dates(dates, sources, (before, after), acquired)
        outlines = polygons(files[2], files[0], grid)
    changes = list_changes(regions, sentences, outlines, grid, labels, described)
    return Findings(
        caption=scene_caption(changes),
        grid=grid,
        dates=described,
        shifts=(shift,),
        changes=changes,
        seen_pixels=seen,
        labels=labels,
        settings=settings,
        versions={name: version(name) for name in ("kcfi", "torch", "transformers", "rasterio")},
        warnings=tuple(warnings),
    )


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


def list_changes(
    regions: Sequence[Region],
    sentences: Sequence[str],
    outlines: dict[int, BaseGeometry],
    grid: Grid,
    labels: dict[int, str],
    dates: Sequence[Date],
) -> tuple[Change, ...]:
    """Regions with their outlines and sentences; those without a sentence get that of the mask."""
    changes = []
    for region, sentence in zip_longest(regions, sentences):
        label, place = labels[region.label], place_of(region.centre, grid)
        caption = sentence or plain_sentence(label, place)
        changes.append(
            Change(
                id=region.number,
                label=label,
                kind=kind_of(caption, label),
                polygon=outlines[region.number],
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
