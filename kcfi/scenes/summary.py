"""`summary.json`: all of a `Findings` but the polygons, which `changes.gpkg` holds, and what can be counted of it."""

import json
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import geopandas
from affine import Affine
from rasterio.crs import CRS
from shapely import MultiPolygon

from kcfi.files import read_json
from kcfi.processing import InputError, refusing
from kcfi.scenes.findings import Change, Date, Findings, Grid, Shift

SUMMARY = "summary.json"
POLYGONS = "changes.gpkg"
GEOPACKAGE = b"SQLite format 3\0"  # its first bytes
SQUARE_METRES_PER_HECTARE = 10_000


def properties(change: Change) -> dict[str, Any]:
    """What the files say of a change beside its polygon, plain JSON."""
    names = ("area_m2", "pixels", "probability", "caption", "place", "before", "after", "first_seen")
    said = {name: getattr(change, name) for name in names}
    return {"id": change.id, "class": change.label, "kind": change.kind, **said}


def area(findings: Findings, pixels: int) -> float | None:
    """The area of so many pixels in m2; None without a CRS."""
    metres = findings.grid.metres
    return None if metres is None else pixels * metres[0] * metres[1]


def size(findings: Findings, changes: Iterable[Change]) -> dict[str, Any]:
    """How many changes there are and how large they are together: `area_m2` and `area_ha` are None without a CRS."""
    changes = list(changes)
    square_metres = None if findings.grid.metres is None else sum(change.area_m2 or 0.0 for change in changes)
    return {
        "count": len(changes),
        "pixels": sum(change.pixels for change in changes),
        "area_m2": square_metres,
        "area_ha": None if square_metres is None else square_metres / SQUARE_METRES_PER_HECTARE,
    }


def totals(findings: Findings) -> list[dict[str, Any]]:
    """A row per class and kind that occurs: `class`, `kind`, and their `size`."""

    def key(change: Change) -> tuple[str, str]:
        return change.label, change.kind

    groups = groupby(sorted(findings.changes, key=key), key)
    return [{"class": label, "kind": kind, **size(findings, group)} for (label, kind), group in groups]


def coverage(findings: Findings) -> float:
    """The share of the grid that every date covers with data, 0 to 1."""
    return findings.seen_pixels / (findings.grid.width * findings.grid.height)


def on_earth(crs: CRS | None) -> bool:
    """Whether coordinates of a CRS can become longitude and latitude: not pixels, nor a site's own grid."""
    return crs is not None and bool(crs.is_projected or crs.is_geographic)


def crs_name(crs: CRS | None) -> str:
    """The CRS for people: "EPSG:32650", the name of a local one, or "pixels"."""
    if crs is None:
        return "pixels"
    code = crs.to_authority(confidence_threshold=100)
    return ":".join(code) if code else crs.to_wkt().split('"')[1]


def to_json(findings: Findings) -> dict[str, Any]:
    """The content of `summary.json`."""
    grid = findings.grid
    return {
        "caption": findings.caption,
        "warnings": findings.warnings,
        "totals": totals(findings),
        "coverage": coverage(findings),
        "seen_pixels": findings.seen_pixels,
        "seen_area_m2": area(findings, findings.seen_pixels),
        "dates": [vars(date) for date in findings.dates],
        "shifts": [vars(shift) for shift in findings.shifts],
        "grid": {
            "crs_name": crs_name(grid.crs),
            "crs": grid.crs.to_wkt() if grid.crs else None,
            "transform": grid.transform[:6],
            "width": grid.width,
            "height": grid.height,
            "metres": grid.metres,
        },
        "labels": findings.labels,
        "settings": findings.settings,
        "versions": findings.versions,
        "changes": [{**properties(change), "box": change.box} for change in findings.changes],
    }


def write_summary(findings: Findings, path: Path) -> None:
    """Write `summary.json`."""
    text = json.dumps(to_json(findings), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_summary(folder: Path) -> Findings:
    """Read a report back.

    Args:
        folder: of `write_findings`.

    Raises:
        InputError: it holds no report, or files of two reports.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise InputError(f"{folder}: no {SUMMARY}, so no report; `kcfi scene BEFORE AFTER -o {folder}` writes one.")
    content = read_json(path)
    with refusing(f"{path} and {POLYGONS} beside it are not of one report: let `kcfi scene` write them anew"):
        polygons = _polygons(folder / POLYGONS)
        grid = content["grid"]
        findings = Findings(
            caption=content["caption"],
            grid=Grid(
                crs=_crs(grid["crs"]),
                transform=Affine(*grid["transform"]),
                width=grid["width"],
                height=grid["height"],
                metres=tuple(grid["metres"]) if grid["metres"] else None,
            ),
            dates=tuple(Date(**{**date, "notes": tuple(date["notes"])}) for date in content["dates"]),
            shifts=tuple(Shift(**shift) for shift in content["shifts"]),
            changes=tuple(_change(change, polygons.pop(change["id"])) for change in content["changes"]),
            seen_pixels=content["seen_pixels"],
            labels={int(value): str(label) for value, label in content["labels"].items()},
            settings=content["settings"],
            versions=content["versions"],
            warnings=tuple(content["warnings"]),
        )
        to_json(findings)  # refuses what is no number where there must be one
        return findings


def _crs(text: str | None) -> CRS | None:
    """A CRS from its WKT. Of other texts GDAL would take some for a file or an address, and read there."""
    if text and not re.match(r"[A-Z_]+\[", text):
        raise ValueError(f"crs {text[:80]!r} is no WKT")
    return CRS.from_wkt(text) if text else None


def _polygons(path: Path) -> dict[int, Any]:
    """The polygons of a GeoPackage by the id of their change; a MultiPolygon of one part is that part."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, which holds the polygons of the report.")
    with path.open("rb") as file:
        if file.read(len(GEOPACKAGE)) != GEOPACKAGE:  # GDAL would try all it knows, and some name addresses
            raise InputError(f"{path}: is no GeoPackage; let `kcfi scene` write the report anew.")
    frame = geopandas.read_file(path)
    shapes = (one.geoms[0] if isinstance(one, MultiPolygon) and len(one.geoms) == 1 else one for one in frame.geometry)
    return dict(zip(frame["id"].tolist(), shapes, strict=True))


def _change(content: dict[str, Any], polygon: Any) -> Change:
    """A change from its entry in `summary.json`."""
    fields = {**content, "label": content["class"], "box": tuple(content["box"]), "polygon": polygon}
    del fields["class"]
    return Change(**fields)
