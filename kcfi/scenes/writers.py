"""`Findings` and the rasters of a scene -> the files of a report.

The same findings give the same bytes: no file holds the time at which it was written.
"""

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import geopandas
import pyogrio
from rasterio.errors import NotGeoreferencedWarning
from rio_cogeo import cog_profiles, cog_translate
from transformers.utils import logging

from kcfi.processing import InputError
from kcfi.scenes.catalogue import ASSETS, refusal, write_item
from kcfi.scenes.findings import Findings
from kcfi.scenes.rasters import CACHE
from kcfi.scenes.report import write_html, write_pdf
from kcfi.scenes.styles import colour, mask_style, polygon_style
from kcfi.scenes.summary import POLYGONS, SUMMARY, crs_name, on_earth, properties, write_summary

logger = logging.get_logger(__name__)

ITEM = "item.json"
UNFINISHED = ".unfinished"  # folder in the report's in which its files wait until all are there
NOT_LON_LAT = "Coordinates are not longitude and latitude, but those of the images: "


def check_output(inputs: Sequence[str | Path], work: Path, output: Path) -> None:
    """Refuse a folder in which a report would replace files that are none of an earlier report.

    Args:
        inputs: the images.
        work: folder of earlier calls.
        output: folder for the report.

    Raises:
        InputError: an image, or with no `work` and no summary there any file, has the name of one of the report's.
    """
    targets = [output / name for name in [*ASSETS, ITEM]]
    own = {path.resolve() for path in targets}
    for path in inputs:
        if Path(path).resolve() in own:
            raise InputError(f"{path}: the report would replace this image; choose another output folder.")
    there = [path for path in targets if path.exists()]
    if there and not (work.exists() or (output / SUMMARY).exists()):
        raise InputError(
            f"{there[0]}: the report would replace this file, which is of no earlier report; move it, or choose "
            "another output folder."
        )


def write_findings(findings: Findings, work: Path, output: Path) -> dict[str, Path]:
    """Write a report: rasters, polygons, their QGIS styles, a STAC item, pages to read, a summary.

    All files are made in a folder of their own and then moved, the summary last: a report with a summary is complete.

    Args:
        findings: of the scene.
        work: folder with `mask.tif` (class ids on the grid, no data 255), `probability.tif` (of change, with a no-data
            value), and `date-0.png`, `date-1.png`, ... (RGB pictures of the dates on the grid, of one size).
        output: folder; the files of an earlier report in it are replaced.

    Returns:
        The files by name. `item.json` is left out where nobody says where or when, `report.pdf` without Pango; a
        line in the log says so.

    Raises:
        InputError: the day of a date is not in ISO 8601.
    """
    folder = output / UNFINISHED
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
    folder.mkdir(parents=True)
    write_rasters(findings, work, folder)
    write_polygons(findings, folder)
    (folder / "mask.qml").write_text(mask_style(findings), encoding="utf-8")
    (folder / "changes.qml").write_text(polygon_style(findings), encoding="utf-8")
    write_html(findings, work, folder / "report.html")
    write_pdf(findings, work, folder / "report.pdf")
    write_summary(findings, folder / SUMMARY)
    if reason := refusal(findings):
        logger.warning(f"{ITEM} is left out: {reason}.")
    else:
        write_item(findings, [name for name in ASSETS if (folder / name).is_file()], folder / ITEM)
    return _publish(folder, output)


def write_rasters(findings: Findings, work: Path, folder: Path) -> None:
    """Write `mask.tif` and `probability.tif` as Cloud-Optimized GeoTIFFs, block by block."""
    colours = {0: (0, 0, 0, 255)}  # TIFF has no transparent colours
    colours |= {value: (*colour(findings, label), 255) for value, label in findings.labels.items()}
    classes = ", ".join(f"{value} {label}" for value, label in {0: "no change", **findings.labels}.items())
    _write_cog(work / "mask.tif", folder, {"units": "class", "classes": classes}, colormap=colours)
    units = {"units": "probability of change"}
    _write_cog(work / "probability.tif", folder, units, overview_resampling="average")


def _write_cog(source: Path, folder: Path, tags: dict[str, str], **settings: Any) -> None:
    profile: Any = cog_profiles.get("deflate")
    profile["BIGTIFF"] = "IF_SAFER"  # beyond 4 GB
    settings |= {"additional_cog_metadata": tags, "config": {"GDAL_CACHEMAX": CACHE}, "in_memory": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # of plain images
        warnings.filterwarnings("ignore", message="Dataset color interpretation was set")  # as it should be
        cog_translate(source, folder / source.name, profile, quiet=True, **settings)


def write_polygons(findings: Findings, folder: Path) -> None:
    """Write `changes.gpkg` in the CRS of the grid and `changes.geojson` as RFC 7946 has it: longitude, latitude.

    The GeoJSON of pixels, or of a site's own grid, is in their coordinates and says so in its member `description`.
    """
    crs = findings.grid.crs
    columns = ["id", "class", "kind", "area_m2", "pixels", "probability", "caption", "place", "before", "after"]
    rows = [properties(change) for change in findings.changes]
    shapes = [change.polygon for change in findings.changes]
    frame = geopandas.GeoDataFrame(rows, columns=[*columns, "first_seen"], geometry=shapes, crs=crs)
    numbers = {"id": "int64", "pixels": "int64", "area_m2": "float64", "probability": "float64"}
    frame = frame.astype(numbers)  # types of a table without rows or without areas too
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": "1970-01-01T00:00:00.000Z"})  # the same bytes every time
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'crs' was not provided")  # plain images have none
            layer: dict[str, Any] = {"promote_to_multi": True, "geometry_type": "MultiPolygon"}
            pyogrio.write_dataframe(frame, folder / POLYGONS, layer="changes", driver="GPKG", **layer)
            said = "pixels, x to the right, y down" if crs is None else crs_name(crs)
            form = {"RFC7946": "YES"} if on_earth(crs) else {"DESCRIPTION": NOT_LON_LAT + said}
            frame = frame if on_earth(crs) else frame.set_crs(None, allow_override=True)
            path = folder / "changes.geojson"
            pyogrio.write_dataframe(frame, path, layer="changes", driver="GeoJSON", layer_options=form)
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": None})


def _publish(folder: Path, output: Path) -> dict[str, Path]:
    """Move the finished files up, the summary last, and remove what an earlier report alone had."""
    (output / SUMMARY).unlink(missing_ok=True)
    names = [name for name in [*ASSETS, ITEM] if name != SUMMARY]
    for name in names:
        (output / name).unlink(missing_ok=True)
    written = {name: (folder / name).replace(output / name) for name in names if (folder / name).is_file()}
    written[SUMMARY] = (folder / SUMMARY).replace(output / SUMMARY)
    folder.rmdir()
    return written
