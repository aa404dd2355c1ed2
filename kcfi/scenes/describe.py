"""`describe_scene`: georeferenced images of one place at several dates -> `Findings`, and their rasters."""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rasterio
import torch
from PIL import Image
from tqdm import tqdm

from kcfi.models import embedded_model, load
from kcfi.processing import Describer, InputError
from kcfi.processing.describer_kcfi import tile_starts
from kcfi.processing.places_kcfi import tells_of_change
from kcfi.scenes.compare import Compared, compare
from kcfi.scenes.dates import check_acquired, coarse_dates, describe_dates, far_dates, fingerprint, unordered_dates
from kcfi.scenes.findings import Change, Date, Findings, Grid
from kcfi.scenes.grid import scene_grid
from kcfi.scenes.rasters import CACHE
from kcfi.scenes.reading import Layer, open_raster
from kcfi.scenes.registration import estimate_shift
from kcfi.scenes.sentences import kind_of, place_of, plain_sentence, scene_caption
from kcfi.scenes.series import check_confirm, pairs, unconfirmed
from kcfi.scenes.writers import check_output, write_findings

WORK = ".work"  # folder in the output for rasters on the way, and what is kept of a run that was stopped
RESOLUTION = 0.5  # m per pixel, of a model that does not say at what it was trained
OVERVIEW = 2048  # px: longest side of the small pictures of the dates
MANY = 10_000  # tiles: more take so long that their number is said before they are read
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
    nodata: float | None = None,
    min_area: float = 25.0,
    max_captions: int | None = None,
    model_resolution: float | None = None,
    acquired: Sequence[str] = (),
    confirm: int = 1,
    between: Callable[[], None] = lambda: None,
) -> Findings:
    """Find what changed between the dates of a scene of any size, and say it.

    A run that was stopped and is started again with the same settings goes on where it was, and ends with the same
    files.

    Args:
        dates: files of two dates or more, the earliest first: GeoTIFFs, rasters of `reading.DRIVERS`, plain images.
        output: folder for the results.
        model: name of a model, or a `Describer` where more than the name matters (device, batch size, instruction).
        reproject: take dates of different CRS; all are brought to that of the first.
        align: take out a constant shift between the dates before they are compared.
        bands: which are red, green and blue, counted from 1.
        stretch: percentiles that become black and white; None = of other than 8 bits 2 and 98, else none.
        nodata: value, in all bands, of pixels without data of files that do not say it (black borders: 0).
        min_area: smallest region that is a change, in m2; without coordinates at `model_resolution` m per pixel.
        max_captions: how many regions, from the largest, get a sentence of the model; None = all.
        model_resolution: m per pixel that the model was trained at; None = as saved with it, else `RESOLUTION`.
        acquired: when the dates were acquired, ISO 8601; empty = as the files say it, if they do.
        confirm: of more than two dates: how many of the later dates must show a change too, see `series.first_seen`.
        between: called between the steps, those of the model aside; what it raises ends the run.

    Raises:
        FileNotFoundError: no such file.
        InputError: dates that cannot be compared, a setting that is wrong, or a model without a change detection head.
    """
    if len(dates) < 2:
        raise InputError(f"A scene has two dates or more, the earliest first; got {len(dates)}.")
    check_acquired(acquired, len(dates))
    check_confirm(confirm, len(dates))
    if not 0 <= min_area < math.inf:
        raise InputError(f"min_area={min_area} must be a number of m2, 0 or above.")
    nodata = None if nodata is None or math.isnan(nodata) else nodata  # pixels that are no number never count as data
    work = Path(output) / WORK
    check_output(dates, work, Path(output))
    describer = model if isinstance(model, Describer) else Describer(*load(model))
    if describer.model.model.change_detection_head is None:
        raise InputError("This model has no change detection head: it cannot find changes in a scene.")
    if describer.threshold is not None:
        raise InputError("kcfi scene has no alarm rate yet: choose by the probability of each change.")
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
    versions = {name: version(name) for name in ("kcfi", "torch", "transformers", "rasterio")}
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
    if nodata is not None:
        settings["nodata"] = nodata
    labels = LABELS[describer.model.config.num_change_classes]
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(rasterio.Env(GDAL_CACHEMAX=CACHE))
        sources = [stack.enter_context(open_raster(path)) for path in dates]
        grid = scene_grid(sources, resolution, reproject)
        layers, shifts = [Layer(sources[0], grid, bands, stretch, nodata=nodata)], []
        for source in sources[1:]:
            between()
            layer = Layer(source, grid, bands, stretch, nodata=nodata)
            shift = estimate_shift(layers[0], layer, grid)
            if align and shift.windows:
                shift = replace(shift, aligned=True)
                layer = Layer(source, grid, bands, stretch, (shift.x, shift.y), nodata)
            layers.append(layer)
            shifts.append(shift)
        warnings += coarse_dates(sources, resolution)
        for path, shift in zip(dates[1:], shifts, strict=True):
            warnings += far_dates((dates[0], path), shift)
        described = describe_dates(dates, sources, layers, acquired)
        warnings += unordered_dates(described)
        tiles = math.prod(len(tile_starts(side, describer.view)) for side in (grid.width, grid.height))
        tiles *= len(pairs(len(dates)))
        describer.expect(tiles)
        for line in [*warnings, *([f"{tiles:,} tiles are read."] if tiles > MANY else [])]:
            tqdm.write(line, file=sys.stderr)
        inputs = [[fingerprint(path), layer.offset] for path, layer in zip(dates, layers, strict=True)]
        least = min_area / (resolution**2 if grid.crs is None else 1)
        images = json.loads(describer.processor.image_processor.to_json_string())
        precision = getattr(describer.encode, "precision", None)  # None = that of torch, which rounds otherwise
        record = {**settings, "image_processor": images, "versions": versions, "encoder": precision}
        found = compare(describer, layers, work, record, inputs, list(labels), least, max_captions, confirm, between)
        between()
        for number, layer in enumerate(layers):
            Image.fromarray(layer.overview(OVERVIEW)[0]).save(work / f"date-{number}.png")
    changes = list_changes(found, grid, labels, described)
    series = {}
    if len(dates) > 2:
        series = {"confirm": confirm}
        warnings += unconfirmed(changes, described, confirm)
    findings = Findings(
        caption=scene_caption(changes),
        grid=grid,
        dates=described,
        shifts=tuple(shifts),
        changes=changes,
        seen_pixels=found.seen,
        labels=labels,
        settings={**settings, "min_area_m2": min_area, "max_captions": max_captions, **series},
        versions=versions,
        warnings=tuple(warnings),
    )
    between()
    write_findings(findings, work, Path(output))
    return findings


def list_changes(found: Compared, grid: Grid, labels: dict[int, str], dates: Sequence[Date]) -> tuple[Change, ...]:
    """Regions with their outlines and sentences; those whose sentence tells of no change get that of the mask."""
    changes = []
    for region, (before, after) in zip(found.regions, found.shown, strict=True):
        label, place = labels[region.label], place_of(region.centre, grid)
        sentence = found.sentences.get(region.number)
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
                before=dates[before].name,
                after=dates[after].name,
                first_seen=dates[after].name,
            )
        )
    return tuple(changes)


def digest(model: torch.nn.Module) -> str:
    """A name for a model's weights: they differ, so does it."""
    found = hashlib.sha256()
    for name, weights in model.state_dict().items():
        found.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
        found.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]
