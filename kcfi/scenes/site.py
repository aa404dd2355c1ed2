"""A report as a folder that any web server can show: a map of the dates with a swipe, changes to click on.

Nothing computes on the server: the browser reads the rasters, Cloud-Optimized GeoTIFFs in the tiles of web maps, by
itself. What draws the map lies in `libraries/`, which `make libraries` fills (libraries/copy.js).
"""

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import geopandas
import jinja2
import morecantile
import rasterio
from rio_cogeo import cog_profiles, cog_translate
from shapely.geometry import Polygon

from kcfi.processing import InputError
from kcfi.scenes.catalogue import LON_LAT, footprint
from kcfi.scenes.findings import Findings, Grid
from kcfi.scenes.rasters import BLOCK, CACHE
from kcfi.scenes.reading import Layer, open_raster
from kcfi.scenes.report import area_text, number
from kcfi.scenes.styles import colour
from kcfi.scenes.summary import area, coverage, crs_name, on_earth, read_summary, size
from kcfi.scenes.writers import UNFINISHED

INDEX = "index.html"
PARTS = (INDEX, "site.js", "site.css", "libraries", "changes.geojson", "mask.tif", "date-*.tif")
MARK = '<meta name="generator" content="kcfi">'  # in the page: an earlier site, which may be replaced
HERE = Path(__file__).parent
LIBRARIES = HERE / "libraries"
LICENCES = "LICENSES.txt"  # copied last
TILES = morecantile.tms.get("WebMercatorQuad")  # the tiles of web maps, in EPSG:3857, 256 px each
NORTHERNMOST = 85.0  # degrees of latitude: their end, north and south
SIDE = 512  # px of a tile of the map, and of a block of the rasters, which are the same pixels
WEBP_QUALITY = 85


def check_site(site: Path, report: Path, dates: Sequence[str | Path]) -> None:
    """Refuse, before anything is computed, what `write_site` could not write.

    Args:
        site: folder for the site.
        report: folder of the report that is to be shown.
        dates: the images.

    Raises:
        InputError: the libraries are missing, the first image has no place on a web map, or the site would replace
            files that are of no earlier one.
    """
    if not (LIBRARIES / LICENCES).is_file():
        raise InputError(
            "A site needs the libraries of its map: run `make libraries` (it needs npm) in the checkout that KCFI is "
            "installed from, or install a wheel that was built after it."
        )
    with open_raster(dates[0]) as first:
        outline(Grid(first.crs, first.transform, first.width, first.height, None), dates[0])
    if site.resolve() == report.resolve():
        raise InputError(f"{site}: is the folder of the report; give the site another, such as {report / 'site'}.")
    there, index = own_files(site), site / INDEX
    earlier = index.is_file() and MARK in index.read_text(encoding="utf-8", errors="replace")
    if there and not (earlier or (site / UNFINISHED).is_dir()):
        raise InputError(
            f"{there[0]}: the site would replace it, and it is of no earlier site; choose another folder."
        )


def own_files(site: Path) -> list[Path]:
    """What of a folder has the name of a part of a site."""
    return sorted(path for pattern in PARTS for path in site.glob(pattern))


def write_site(report: Path, dates: Sequence[str | Path], site: Path) -> Path:
    """Write the site of a report.

    All files are made in a folder of their own and then moved, the page last.

    Args:
        report: folder of `write_findings`.
        dates: the images it is of.
        site: folder; an earlier site in it is replaced, all else in it (`.git`, `CNAME`) stays.

    Returns:
        The page, `site/index.html`.

    Raises:
        FileNotFoundError: an image is no longer there.
        InputError: there is no report, its dates are others, or what `check_site` refuses.
    """
    check_site(site, report, dates)
    findings = read_summary(report)
    if len(dates) != len(findings.dates):
        raise InputError(f"{report} is of {len(findings.dates)} dates; got {len(dates)} images.")
    bounds = outline(findings.grid, report).bounds
    folder = site / UNFINISHED
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
    folder.mkdir(parents=True)
    credits = [_write_date(path, number, findings, folder) for number, path in enumerate(dates)]
    _write_tiles(report / "mask.tif", folder / "mask.tif", "deflate")
    for source in (report / "changes.geojson", HERE / "site.js", HERE / "site.css"):
        shutil.copyfile(source, folder / source.name)
    shutil.copytree(LIBRARIES, folder / LIBRARIES.name)
    with rasterio.open(folder / "mask.tif") as mask:
        zoom = TILES.zoom_for_res(mask.res[0]) - 1  # of tiles of twice the side
    page = render(findings, bounds, zoom, list(dict.fromkeys(filter(None, credits))))
    (folder / INDEX).write_text(page, encoding="utf-8")
    for old in own_files(site):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    for new in sorted(folder.iterdir(), key=lambda path: path.name == INDEX):
        new.rename(site / new.name)
    folder.rmdir()
    return site / INDEX


def render(findings: Findings, bounds: Sequence[float], zoom: int, credits: Sequence[str]) -> str:
    """The page.

    Args:
        findings: of a grid on earth.
        bounds: of the grid: west, south, east, north, in degrees.
        zoom: of the map at which a pixel of the screen is one of the rasters.
        credits: whose images they are.
    """
    settings = {
        "bounds": bounds,
        "zoom": zoom,
        "side": SIDE,
        "dates": [f"date-{number}.tif" for number in range(len(findings.dates))],
        "classes": [
            {"value": value, "label": label, "colour": colour(findings, label)}
            for value, label in findings.labels.items()
        ],
    }
    shapes = [change.polygon for change in findings.changes]
    polygons = geopandas.GeoSeries(shapes, crs=findings.grid.crs).to_crs(LON_LAT)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number}
    return environment.get_template("site.html").render(
        mark=MARK,
        findings=findings,
        settings=settings,
        places=[polygon.bounds for polygon in polygons],
        credits=credits,
        warnings=[_without_folders(warning, findings) for warning in findings.warnings],
        colours={label: "#" + bytes(colour(findings, label)).hex() for label in findings.labels.values()},
        whole=size(findings, findings.changes),
        coverage=coverage(findings),
        seen_area=area(findings, findings.seen_pixels),
        crs=crs_name(findings.grid.crs),
        area_text=area_text,
    )


def _without_folders(text: str, findings: Findings) -> str:
    """A text with the names of the images in place of their paths: what is shared tells of no folders."""
    for date in findings.dates:
        text = text.replace(date.path, Path(date.path).name)
    return text


def outline(grid: Grid, name: str | Path) -> Polygon:
    """The outline of a grid in longitude and latitude.

    Raises:
        InputError: it has no place on a web map; names what it is the grid of.
    """
    if not on_earth(grid.crs):
        raise InputError(
            f"{name}: a site is a map, and needs images with a coordinate reference system on earth "
            "(`gdal_edit.py -a_srs -a_ullr` gives them one); report.html shows plain images too."
        )
    found = footprint(grid)
    if found is None or max(map(abs, found.bounds[1::2])) > NORTHERNMOST:
        raise InputError(f"{name}: lies across the antimeridian or at a pole, where a web map has no place for it.")
    return found


def _write_date(path: str | Path, number: int, findings: Findings, folder: Path) -> str:
    """Write a date as it was compared: on the grid, in 8 bits, aligned. Returns whose image it is, "" = not said."""
    grid, said = findings.grid, findings.settings
    shift = findings.shifts[number - 1] if number else None
    offset = (shift.x, shift.y) if shift and shift.aligned else (0.0, 0.0)
    plain = folder / "plain.tif"
    profile: dict[str, Any] = {"driver": "GTiff", "count": 4, "dtype": "uint8", "alpha": "yes", "bigtiff": "if_safer"}
    profile |= {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate"}
    profile |= {"crs": grid.crs, "transform": grid.transform, "width": grid.width, "height": grid.height}
    with rasterio.Env(GDAL_CACHEMAX=CACHE), open_raster(path) as source:
        layer = Layer(source, grid, said["bands"], said["stretch"], offset, said.get("nodata"))
        with rasterio.open(plain, "w", photometric="rgb", **profile) as file:
            for top in range(0, grid.height, BLOCK):
                bottom = min(top + BLOCK, grid.height)
                colours, seen = layer.read((0, top, grid.width, bottom))
                window = rasterio.windows.Window(0, top, grid.width, bottom - top)
                file.write(colours.transpose(2, 0, 1), (1, 2, 3), window=window)
                file.write(seen.astype("uint8") * 255, 4, window=window)
        credit = source.tags().get("TIFFTAG_COPYRIGHT", "").strip()
    _write_tiles(plain, folder / f"date-{number}.tif", "webp", resampling="bilinear", overview_resampling="average")
    plain.unlink()
    return credit


def _write_tiles(source: Path, path: Path, compression: str, **settings: Any) -> None:
    """Write a raster as a Cloud-Optimized GeoTIFF whose blocks are tiles of web maps, block by block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Non-standard compression schema: webp")  # browsers know it
        profile: Any = cog_profiles.get(compression)
    profile |= {"blockxsize": SIDE, "blockysize": SIDE, "BIGTIFF": "IF_SAFER"}
    if compression == "webp":
        profile["WEBP_LEVEL"] = WEBP_QUALITY
    settings |= {"config": {"GDAL_CACHEMAX": CACHE}, "in_memory": False, "allow_intermediate_compression": True}
    cog_translate(source, path, profile, tms=TILES, aligned_levels=1, quiet=True, **settings)
