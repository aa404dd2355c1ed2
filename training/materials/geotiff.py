"""GeoTIFFs and footprints in GeoJSON as pictures for `sources.py`. Needs rasterio, the extra `geo`."""

import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kcfi.files import read_json
from kcfi.processing import InputError, refusing
from kcfi.training.materials.sources import FINEST, SURFACES, Picture, Source

try:
    import rasterio
    from rasterio import features, warp
    from rasterio.crs import CRS
    from rasterio.enums import Resampling
    from rasterio.errors import RasterioError
except ImportError as error:
    raise InputError(
        "rasterio is needed for footprints in GeoJSON, and for images whose description gives no metres_per_pixel: "
        'pip install "kcfi[geo]"'
    ) from error

LON_LAT = CRS.from_epsg(4326)  # of GeoJSON that names no other (RFC 7946)
METRES_PER_DEGREE = 111_195.0  # along a great circle


def read_geotiff(source: Source, image: Path, labels: Path | None) -> Picture:
    """Read an image that knows its place on the ground, reduced to pixels of `FINEST` m where they are smaller.

    Args:
        source: Says how large a pixel is, if not as large as in the file, and what the colours of masks mean.
        image: GeoTIFF of 8 bits per band: red, green and blue, whatever follows them, or grey alone.
        labels: A mask, footprints in GeoJSON, or None.

    Returns:
        The picture; its labels are "unknown" where the image has no data.

    Raises:
        FileNotFoundError: If a file is missing.
        InputError: If a file cannot be read, the image has no place or more than 8 bits, or the mask another size.
    """
    try:
        with rasterio.open(image) as file:
            if file.crs is None:
                raise InputError(
                    f"{image}: no coordinate system. Give GeoTIFFs, or masks as png files and metres_per_pixel in the "
                    "description of the source"
                )
            if file.dtypes[0] != "uint8":
                raise InputError(
                    f"{image}: bands of {file.dtypes[0]}; expected 8 bits (`gdal_translate -ot Byte -scale`)"
                )
            metres = source.metres_per_pixel
            pixel = ground_size(file.crs, file.transform, file.shape) if metres is None else (metres, metres)
            width, height = (
                max(round(side * min(size / FINEST, 1)), 1)
                for side, size in zip((file.width, file.height), pixel, strict=True)
            )
            shrunk = file.width / width, file.height / height
            bands = [1, 2, 3] if file.count >= 3 else [1, 1, 1]
            pixels = file.read(bands, out_shape=(3, height, width), resampling=Resampling.average)
            known = file.dataset_mask(out_shape=(height, width)) > 0
            transform = stretch(file.transform, *shrunk)
            crs, bounds, size = file.crs, file.bounds, (file.width, file.height)
    except RasterioError as error:
        raise InputError(f"{image}: cannot be read as a GeoTIFF ({error})") from error
    surfaces = None
    if labels is not None and labels.suffix == ".geojson":
        buildings = draw_footprints(labels, crs, bounds, transform, (height, width))
        surfaces = np.where(buildings, SURFACES.index("building"), SURFACES.index("open")).astype(np.uint8)
    elif labels is not None:
        mask = Image.fromarray(source.read_mask(labels, size, image))
        surfaces = np.array(mask.resize((width, height), Image.Resampling.NEAREST))
    if surfaces is not None:
        surfaces[~known] = SURFACES.index("unknown")
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return Picture(picture, surfaces, (pixel[0] * shrunk[0], pixel[1] * shrunk[1]))


def ground_size(crs: Any, transform: Any, shape: tuple[int, int]) -> tuple[float, float]:
    """Width and height on the ground, in m, of the pixel in the middle of an image.

    Measured along the great circle, so that it is right in degrees, in feet and in Web Mercator too, whose metres are
    too long anywhere but at the equator.

    Args:
        crs: Coordinate system of the image.
        transform: From columns and rows to coordinates.
        shape: Height and width in pixels.
    """
    row, column = shape[0] / 2, shape[1] / 2
    corners = rasterio.transform.xy(transform, [row, row, row + 1], [column, column + 1, column], offset="ul")
    lon, lat = np.array(warp.transform(crs, LON_LAT, *corners))
    east, north = (lon[1:] - lon[0]) * np.cos(np.radians(lat[0])), lat[1:] - lat[0]
    width, height = np.hypot(east, north) * METRES_PER_DEGREE
    return float(width), float(height)


def stretch(transform: Any, across: float, down: float) -> Any:
    """The transform of an image whose columns and rows are so many times as large."""
    a, b, c, d, e, f = transform[:6]
    return rasterio.Affine(a * across, b * down, c, d * across, e * down, f)


def draw_footprints(
    path: Path, crs: Any, bounds: tuple[float, float, float, float], transform: Any, shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """Draw the polygons of a GeoJSON file over an image.

    Args:
        path: The file; it may reach far beyond the image.
        crs: Coordinate system of the image.
        bounds: Left, bottom, right and top of the image in it.
        transform: From columns and rows of the result to coordinates.
        shape: Height and width of the result.

    Returns:
        Where a building is, (height, width).

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it cannot be read.
    """
    polygons, boxes, system = read_footprints(path)
    left, bottom, right, top = warp.transform_bounds(crs, system, *bounds)
    near = (boxes[:, 0] <= right) & (boxes[:, 2] >= left) & (boxes[:, 1] <= top) & (boxes[:, 3] >= bottom)
    shapes = [warp.transform_geom(system, crs, polygons[index]) for index in np.flatnonzero(near)]
    if not shapes:
        return np.zeros(shape, np.bool_)
    return features.rasterize(shapes, shape, transform=transform, dtype="uint8") > 0


@lru_cache(maxsize=1)  # one file often serves all images of a source
def read_footprints(path: Path) -> tuple[list[dict[str, Any]], NDArray[np.float64], Any]:
    """Read the polygons of a GeoJSON file; points and lines are left out.

    Returns:
        Geometries, their bounds (N, 4) as left, bottom, right, top, and their coordinate system.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no FeatureCollection, or a polygon or the coordinate system is refused.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("features"), list):
        raise InputError(f"{path}: no list 'features'; expected a FeatureCollection of GeoJSON")
    polygons = []
    for number, feature in enumerate(content["features"]):
        geometry = feature.get("geometry") if isinstance(feature, dict) else None
        if not isinstance(geometry, dict) or geometry.get("type") not in ("Polygon", "MultiPolygon"):
            continue
        with refusing(f"{path}: features[{number}] is no valid {geometry['type']}"):
            depth = 1 if geometry["type"] == "Polygon" else 2
            if not (_holds_rings(geometry["coordinates"], depth) and features.is_valid_geom(geometry)):
                raise ValueError("its coordinates are not closed rings of numbers")
        polygons.append(geometry)
    with refusing(f"{path}: its crs is not understood; leave it out for longitude, latitude"):
        name = content["crs"]["properties"]["name"] if content.get("crs") else ""
        if not re.fullmatch(r"[\w:.-]*", name):  # GDAL would fetch an address
            raise ValueError(f"{name!r} is no name as EPSG:32650")
        system = CRS.from_user_input(name) if name else LON_LAT
    return polygons, np.array([features.bounds(polygon) for polygon in polygons]).reshape(-1, 4), system


def _holds_rings(value: Any, depth: int) -> bool:
    """Whether lists, nested so deep, hold rings: four positions or more, of two finite numbers or more."""
    if not isinstance(value, list) or not value:
        return False
    if depth:
        return all(_holds_rings(one, depth - 1) for one in value)
    if len(value) < 4 or not all(isinstance(place, list) and len(place) > 1 for place in value):
        return False
    return all(isinstance(number, int | float) and math.isfinite(number) for place in value for number in place)
