"""Findings with the rasters behind them: drawn rectangles of change on a grid, as detection leaves them."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from PIL import Image
from rasterio.crs import CRS
from scipy import ndimage
from shapely import box
from shapely.affinity import affine_transform

from kcfi.scenes.findings import Change, Date, Findings, Grid, Shift
from kcfi.scenes.report import printer
from kcfi.scenes.writers import write_findings

PRINTS = printer() is not None  # not without Pango

UTM = CRS.from_epsg(32650)
PLACES = [
    ["north-west", "north", "north-east"],
    ["west", "centre", "east"],
    ["south-west", "south", "south-east"],
]
LABELS = {1: "road", 2: "building"}


def make_grid(width=600, height=450, crs=UTM, pixel=0.5):
    """A grid of `pixel` m whose top left corner lies at 400,000 m east, 3,500,000 m north; in pixels without a CRS."""
    if crs is None:
        return Grid(None, Affine.identity(), width, height, None)
    return Grid(crs, Affine(pixel, 0, 400_000, 0, -pixel, 3_500_000), width, height, (pixel, pixel))


def make_change(
    number, grid, place_box, label="building", kind="appeared", probability=0.9, first_seen="2021", **more
):
    """A rectangle of change, given by its (left, top, right, bottom) in pixels."""
    left, top, right, bottom = place_box
    t = grid.transform
    pixels = (right - left) * (bottom - top)
    row, column = (top + bottom) * 3 // (2 * grid.height), (left + right) * 3 // (2 * grid.width)
    fields = {
        "polygon": affine_transform(box(left, top, right, bottom), [t.a, t.b, t.d, t.e, t.c, t.f]),
        "pixels": pixels,
        "area_m2": pixels * grid.metres[0] * grid.metres[1] if grid.metres else None,
        "caption": f"A {label} has {kind} in the {PLACES[row][column]}.",
        "place": PLACES[row][column],
        "before": "2018",
        "after": "2021",
    }
    return Change(
        id=number,
        label=label,
        kind=kind,
        probability=probability,
        box=place_box,
        first_seen=first_seen,
        **fields | more,
    )


def make_findings(grid=None, changes=(), **more):
    """Findings of two dates on a grid, 2018 and 2021, every pixel seen unless `more` says otherwise."""
    grid = grid or make_grid()
    fields = {
        "caption": f"{len(changes)} changes were found.",
        "dates": (
            Date("before.tif", "2018", "2018-05-01"),
            Date("after.tif", "2021", "2021-06-02", ("resampled from 0.30 to 0.50 m/px",)),
        ),
        "shifts": (Shift(0.4, -0.2, 0.1, 12),),
        "seen_pixels": grid.width * grid.height,
        "labels": LABELS,
        "settings": {"model": "kcfi-tiny", "tile": 256, "stretch": [2, 98]},
        "versions": {"kcfi": "0.1.0", "rasterio": "1.4.4"},
    }
    return Findings(grid=grid, changes=tuple(changes), **fields | more)


def write_work(findings, folder: Path) -> Path:
    """What detection leaves for the writers: mask, probability, pictures of the dates."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = findings.grid
    mask = np.zeros((grid.height, grid.width), np.uint8)
    percent = np.full(mask.shape, 2, np.uint8)
    pictures = [np.random.default_rng(0).integers(60, 110, (*mask.shape, 3), np.uint8) for _ in findings.dates]
    for change in findings.changes:
        left, top, right, bottom = change.box
        [value] = [value for value, label in findings.labels.items() if label == change.label]
        mask[top:bottom, left:right] = value
        percent[top:bottom, left:right] = round(100 * change.probability)
        pictures[0 if change.kind == "removed" else -1][top:bottom, left:right] = (200, 190, 170)
    unseen = mask.size - findings.seen_pixels
    mask.flat[mask.size - unseen :] = percent.flat[mask.size - unseen :] = 255
    profile = {"driver": "GTiff", "count": 1, "width": grid.width, "height": grid.height}
    profile |= {"crs": grid.crs, "transform": grid.transform}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        for name, values, scale in (("mask", mask, 1), ("probability", percent, 0.01)):
            with rasterio.open(folder / f"{name}.tif", "w", dtype="uint8", nodata=255, **profile) as file:
                file.write(values, 1)
                file.scales = (scale,)
    for number, picture in enumerate(pictures):
        image = Image.fromarray(picture)
        image.thumbnail((2048, 2048))
        image.save(folder / f"date-{number}.png")
    return folder


def town(count, grid=None, **more):
    """Findings of `count` small rectangles in rows, the largest first, of all classes and kinds."""
    grid = grid or make_grid()
    columns = max(1, round((count * grid.width / grid.height) ** 0.5))
    across, down = grid.width // columns, grid.height // max(1, -(-count // columns))
    kinds = ("appeared", "appeared", "removed", "changed")
    changes = []
    for index in range(count):
        x, y, share = index % columns * across, index // columns * down, 0.8 - 0.5 * index / count
        place = (x, y, x + max(2, int(across * share)), y + max(1, int(down * share * 0.7)))
        label = "road" if index % 5 == 0 else "building"
        probability = 0.5 + (index * 7 % 50) / 100
        changes.append(make_change(index + 1, grid, place, label, kinds[index % 4], probability))
    return make_findings(grid, changes, **more)


def five(**more):
    """Five changes on a UTM grid of 600 x 450 px of 0.5 m; the bottom 50 rows of the grid have no data."""
    grid = make_grid()
    changes = [
        make_change(1, grid, (420, 30, 580, 90), probability=0.95),  # north-east, 2,400 m2
        make_change(2, grid, (20, 20, 120, 80), probability=0.85),  # north-west, 1,500 m2
        make_change(3, grid, (250, 160, 350, 190), "road", probability=0.7),  # centre, 750 m2
        make_change(4, grid, (450, 320, 500, 360), kind="removed", probability=0.6),  # south-east, 500 m2
        make_change(5, grid, (500, 100, 520, 120), kind="changed", probability=0.5),  # north-east, 100 m2
    ]
    return make_findings(grid, changes, **{"seen_pixels": 600 * 400, **more})


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """A report of `five`, written once."""
    folder = tmp_path_factory.mktemp("scene")
    findings = five()
    write_findings(findings, write_work(findings, folder / "work"), folder / "report")
    return folder / "report"


PLACE = Affine(0.5, 0, 500_000, 0, -0.5, 4_400_000)  # with EPSG:32650


def save_raster(path, pixels, crs="EPSG:32650", transform=PLACE, nodata=None, **profile):
    """Write (H, W) or (H, W, C) as a GeoTIFF; `crs=None` gives a plain image."""
    bands = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    count, height, width = bands.shape
    place = {} if crs is None else {"crs": crs, "transform": transform}
    profile = {"driver": "GTiff", "dtype": bands.dtype, "nodata": nodata, **place, **profile}
    with rasterio.open(path, "w", width=width, height=height, count=count, **profile) as file:
        file.write(bands)
    return path


@pytest.fixture
def write_raster():
    return save_raster


def draw_texture(height, width, seed=0):
    """Smooth random colours (H, W, 3), uint8: what survives being resampled."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (2, 2, 0), mode="wrap")
    return (128 + 40 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)


@pytest.fixture
def texture():
    return draw_texture
