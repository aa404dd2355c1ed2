"""A STAC item of a report, so that catalogues of images can list it."""

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import geopandas
import numpy as np
import pyproj
import pystac
from pystac.extensions.projection import ProjectionExtension
from shapely import box, segmentize, set_precision
from shapely.affinity import affine_transform
from shapely.geometry import Polygon, mapping
from shapely.geometry.polygon import orient

from kcfi.processing import InputError
from kcfi.scenes.findings import Date, Findings, Grid
from kcfi.scenes.summary import on_earth

PROCESSING = "https://stac-extensions.github.io/processing/v1.2.0/schema.json"
LON_LAT = "EPSG:4326"
PRECISION = 1e-7  # degrees: a centimetre

# media type and roles of what `write_findings` writes
ASSETS = {
    "mask.tif": (pystac.MediaType.COG, ["data"]),
    "probability.tif": (pystac.MediaType.COG, ["data"]),
    "changes.gpkg": (pystac.MediaType.GEOPACKAGE, ["data"]),
    "changes.geojson": (pystac.MediaType.GEOJSON, ["data"]),
    "summary.json": (pystac.MediaType.JSON, ["metadata"]),
    "mask.qml": (pystac.MediaType.XML, ["style"]),
    "changes.qml": (pystac.MediaType.XML, ["style"]),
    "report.html": (pystac.MediaType.HTML, ["overview"]),
    "report.pdf": (pystac.MediaType.PDF, ["overview"]),
}


def refusal(findings: Findings) -> str | None:
    """Why there can be no STAC item, which must say where and when; None if there can."""
    if not on_earth(findings.grid.crs):
        return "the coordinates of the images cannot become longitude and latitude"
    if not (findings.dates[0].acquired and findings.dates[-1].acquired):
        return "nobody says when the first or the last image was acquired"
    if footprint(findings.grid) is None:
        return "the scene touches the antimeridian or a pole, where its outline has no longitudes in order"
    return None


def write_item(findings: Findings, names: Iterable[str], path: Path) -> None:
    """Write a STAC item with the projection and processing extensions.

    Args:
        findings: of which `refusal` says nothing.
        names: files of the report beside the item.
        path: the item.

    Raises:
        InputError: a date is not in ISO 8601.
        ValueError: the grid has no `footprint`.
    """
    grid = findings.grid
    outline = footprint(grid)
    if outline is None:
        raise ValueError("The grid has no outline on earth, see `refusal`.")
    moments = [_moment(date) for date in findings.dates if date.acquired]
    item = pystac.Item(
        id="kcfi-" + re.sub(r"[^\w.-]+", "-", "-".join(date.name for date in findings.dates)),
        geometry=mapping(outline),
        bbox=list(outline.bounds),
        datetime=None,
        start_datetime=min(moments),
        end_datetime=max(moments),
        properties={"description": findings.caption, "processing:software": findings.versions},
        stac_extensions=[PROCESSING],
    )
    crs = pyproj.CRS(grid.crs)
    code = crs.to_authority(min_confidence=100)
    ProjectionExtension.ext(item, add_if_missing=True).apply(
        code=":".join(code) if code else None,
        wkt2=None if code else crs.to_wkt(),
        shape=[grid.height, grid.width],
        transform=list(grid.transform[:6]),
    )
    for name in names:
        media_type, roles = ASSETS[name]
        item.add_asset(name, pystac.Asset(href=f"./{name}", media_type=media_type, roles=roles))
    content = item.to_dict(include_self_link=False, transform_hrefs=False)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def footprint(grid: Grid) -> Polygon | None:
    """The outline of a grid on earth, longitude and latitude to 1e-7 degrees, counterclockwise (RFC 7946).

    Each side has four parts, which follow its curve.
    None: it touches the antimeridian or a pole, where longitudes jump.
    """
    sides = segmentize(box(0, 0, grid.width, grid.height), max(grid.width, grid.height) / 4)
    placed = affine_transform(sides, grid.transform.to_shapely())
    [outline] = geopandas.GeoSeries([placed], crs=grid.crs).to_crs(LON_LAT)
    longitudes, latitudes = np.array(outline.exterior.coords).T
    inside = (np.abs(longitudes) < 180 - PRECISION) & (np.abs(latitudes) < 90 - PRECISION)  # neither is infinite
    if not inside.all() or np.ptp(longitudes) > 180 or not outline.is_valid:
        return None
    return orient(set_precision(outline, PRECISION))


def _moment(date: Date) -> datetime:
    """When a date was acquired; a day without an hour begins at midnight UTC."""
    try:
        moment = datetime.fromisoformat(date.acquired)
    except ValueError as error:
        raise InputError(f"{date.path}: acquired {date.acquired!r} is no date in ISO 8601, as 2021-05-30.") from error
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
