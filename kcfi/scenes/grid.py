"""The grid on which the dates of a scene are compared: that of the first date, at the model's metres per pixel.

A model knows objects at the size in pixels that it was trained on, so the grid's pixels are as large as those of the
training images (`KCFIProcessor.ground_sampling_distance`), in the coordinate reference system (CRS) of the first
date. In a geographic CRS they are steps in degrees, of longitude and of latitude, that have this length at the scene's
centre.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio import warp
from rasterio.crs import CRS
from rasterio.errors import RasterioError

from kcfi.processing import InputError
from kcfi.scenes.findings import Grid

SAME_SIZE = 0.01  # pixels that differ by less than this share are alike
TRUE_TO_LENGTH = 0.01  # a projection that keeps lengths to this share is taken at its word, as maps are
LON_LAT = CRS.from_epsg(4326)
EARTH = 6_378_137.0, 0.006_694_38  # WGS 84: semi-major axis in m, first eccentricity squared
OnGround = tuple[NDArray[np.float64], NDArray[np.float64]]  # vectors in m, east and north


def scene_grid(sources: Sequence[Any], resolution: float, reproject: bool = False) -> Grid:
    """The common grid of all dates.

    Args:
        sources: datasets of rasterio, in order of time.
        resolution: m per pixel of the images that the model was trained on.
        reproject: take dates of another CRS than the first.

    Raises:
        InputError: a CRS on some dates only, different ones without `reproject`, no common ground, or images without a
            CRS of different sizes or places; names both files.
    """
    first = sources[0]
    for other in sources[1:]:
        _check_crs(first, other, reproject)
    if first.crs is None:
        for other in sources[1:]:
            _check_plain(first, other)
        return Grid(None, Affine.identity(), first.width, first.height, None)
    left, bottom, right, top = _bounds(first)
    for other in sources[1:]:
        try:
            there = warp.transform_bounds(other.crs, first.crs, *_bounds(other), densify_pts=21)
        except RasterioError as error:
            raise InputError(f"{other.name} cannot be brought to the CRS of {first.name}: {error}.") from error
        left, bottom = max(left, there[0]), max(bottom, there[1])
        right, top = min(right, there[2]), min(top, there[3])
        if left >= right or bottom >= top:
            raise InputError(
                f"{first.name} and {other.name} have no ground in common: give two dates of one place, or correct the "
                "CRS of the one that is wrong (`gdal_edit.py -a_srs`)."
            )
    metres = ground_metres(first.crs, (left + right) / 2, (bottom + top) / 2)
    step = resolution / metres[0], resolution / metres[1]
    own = first.transform
    if is_north_up(own) and all(abs(a / b - 1) < SAME_SIZE for a, b in zip((own.a, -own.e), step, strict=True)):
        step = own.a, -own.e  # whole pixels of the first date, which is then read as it is
        left = own.c + np.ceil((left - own.c) / step[0] - 1e-3) * step[0]
        top = own.f - np.ceil((own.f - top) / step[1] - 1e-3) * step[1]
    width, height = (int((b - a) / c + 1e-3) for a, b, c in ((left, right, step[0]), (bottom, top, step[1])))
    if not (width and height):
        names = " and ".join(source.name for source in sources)
        raise InputError(f"{names} have less than a pixel of {resolution} m in common: give two dates of one place.")
    transform = Affine(step[0], 0, float(left), 0, -step[1], float(top))
    return Grid(first.crs, transform, width, height, (step[0] * metres[0], step[1] * metres[1]))


def is_north_up(transform: Affine) -> bool:
    """Whether rows run west to east and columns north to south."""
    return transform.b == transform.d == 0 and transform.a > 0 > transform.e


def ground_metres(crs: CRS, x: float, y: float) -> tuple[float, float]:
    """Length in m, on the ground, of one unit of a CRS to the right and up, at a place."""
    units = _units(crs, np.array([x]), np.array([y]))
    if units is None:
        return (_metres_per_unit(crs),) * 2
    right, up = (float(np.hypot(*vector)[0]) for vector in units)
    return right, up


def pixel_areas(grid: Grid) -> NDArray[np.float64] | None:
    """Area in m2 of a pixel of every row (H,), at the row's middle; None without a CRS."""
    if grid.crs is None:
        return None
    size = abs(grid.transform.a * grid.transform.e)
    place = grid.transform  # without rotation
    x = np.full(grid.height, place.c + place.a * grid.width / 2)
    units = _units(grid.crs, x, np.asarray(place.f + place.e * (np.arange(grid.height) + 0.5), np.float64))
    if units is None:
        return np.full(grid.height, size * _metres_per_unit(grid.crs) ** 2)
    (east, north), (east_up, north_up) = units
    return size * np.abs(east * north_up - north * east_up)


def _units(crs: CRS, x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[OnGround, OnGround] | None:
    """What one unit of a CRS to the right, and one up, are on the ground at places.

    None: the CRS keeps lengths (`TRUE_TO_LENGTH`), or is one of nobody knows where, so that its unit says it. Others
    do not: a metre of EPSG:3857 is half a metre at 60 degrees north.
    """
    if crs.is_geographic:
        one = (_metres_per_degree(y)[0], np.zeros_like(y)), (np.zeros_like(y), _metres_per_degree(y)[1])
        return one
    if not crs.is_projected:
        return None
    unit = _metres_per_unit(crs)
    step = 10 / unit  # 10 m
    places = np.concatenate([x, x + step, x]), np.concatenate([y, y, y + step])
    try:
        longitudes, latitudes = (np.array(a).reshape(3, -1) for a in warp.transform(crs, LON_LAT, *places))
    except RasterioError:
        return None  # a projection of a place that is not told
    per_degree = _metres_per_degree(latitudes[0])
    east = (longitudes - longitudes[0] + 180) % 360 - 180  # also across the antimeridian
    steps = east, latitudes - latitudes[0]
    right, up = (tuple(a[k] * metres / step for a, metres in zip(steps, per_degree, strict=True)) for k in (1, 2))
    lengths = np.concatenate([np.hypot(*right), np.hypot(*up)]) / unit
    return None if (np.abs(lengths - 1) < TRUE_TO_LENGTH).all() else (right, up)  # type: ignore[return-value]


def _metres_per_unit(crs: CRS) -> float:
    """Length in m of the unit of a CRS that is not geographic; rasterio does not say it of a local one."""
    if crs.is_projected:
        return float(crs.linear_units_factor[1])
    units = re.findall(r'UNIT\["[^"]*",([-+.\deE]+)', crs.to_wkt())
    return float(units[-1]) if units else 1.0


def _metres_per_degree(latitude: NDArray[np.float64]) -> OnGround:
    """Length in m of a degree of longitude and of one of latitude, on the ellipsoid."""
    axis, eccentricity = EARTH
    phi = np.radians(latitude)
    root = np.sqrt(1 - eccentricity * np.sin(phi) ** 2)
    return np.radians(axis / root * np.cos(phi)), np.radians(axis * (1 - eccentricity) / root**3)


def _bounds(source: Any) -> tuple[float, float, float, float]:
    """Left, bottom, right, top of a raster in its own CRS, also of a rotated one."""
    corners = [source.transform @ (x, y) for x in (0, source.width) for y in (0, source.height)]
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _check_crs(first: Any, other: Any, reproject: bool) -> None:
    if (first.crs is None) != (other.crs is None):
        bare, known = (first, other) if first.crs is None else (other, first)
        raise InputError(
            f"{bare.name} has no coordinate reference system, but {known.name} has one ({name_of(known.crs)}): give "
            "both (`gdal_edit.py -a_srs`) or take both as plain images of one size."
        )
    if first.crs != other.crs and not reproject:
        raise InputError(
            f"{first.name} is in {name_of(first.crs)}, {other.name} in {name_of(other.crs)}: if both are right, "
            "--reproject (reproject=True in Python) brings the second to the first; else correct the wrong one "
            "(`gdal_edit.py -a_srs`)."
        )


def _check_plain(first: Any, other: Any) -> None:
    if first.shape != other.shape:
        raise InputError(
            f"{first.name} is {first.width} x {first.height} px, {other.name} {other.width} x {other.height} px: "
            "without coordinates they must show one place, pixel by pixel. Crop or resample one of them."
        )
    if first.transform != other.transform:
        raise InputError(
            f"{first.name} and {other.name} lie at different places, but have no coordinate reference system: give "
            "them one (`gdal_edit.py -a_srs`)."
        )


def name_of(crs: CRS) -> str:
    """EPSG:32650, or the name that the CRS gives itself."""
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else str(crs.to_wkt().split('"')[1])
