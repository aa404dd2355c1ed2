"""`report.html`, one file that opens without a network, and `report.pdf` by the same template."""

import base64
import io
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, ImageFile
from shapely import simplify
from shapely.affinity import affine_transform, scale
from shapely.geometry.base import BaseGeometry
from transformers.utils import logging

from kcfi.scenes.findings import Findings, Grid
from kcfi.scenes.styles import colour
from kcfi.scenes.summary import SQUARE_METRES_PER_HECTARE, area, coverage, crs_name, size, totals

logger = logging.get_logger(__name__)

SIDE = 2048  # px of a date's picture in a report of two dates, at most
PRINTED_SIDE = 1024  # the same on paper
PRINTED_ROWS = 500  # changes that the table on paper lists, the largest
QUALITY = 85  # of their JPEG


def write_html(findings: Findings, work: Path, path: Path) -> None:
    """Write the page: a map with a swipe, the table of changes, totals, coverage, settings, versions."""
    path.write_text(render(findings, work), encoding="utf-8")


def write_pdf(findings: Findings, work: Path, path: Path) -> None:
    """Print the page; without WeasyPrint or Pango, which it needs, a line in the log says how to get them."""
    html = printer()
    if html is None:
        logger.warning(
            'report.pdf is left out: it needs `pip install "kcfi[geo]"` and Pango (Debian and Ubuntu: '
            "`apt install libpango-1.0-0 libpangoft2-1.0-0`). Or print report.html with a browser."
        )
        return
    html(string=render(findings, work, printed=True)).write_pdf(path)


def printer() -> Any:
    """WeasyPrint's `HTML`; None without it or Pango.

    Its import tells PIL to take cut-off images for whole ones, in the whole process: that is undone.
    """
    cut_off = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with redirect_stdout(io.StringIO()):  # where WeasyPrint says that Pango is missing
            from weasyprint import HTML
    except (ImportError, OSError):
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = cut_off
    return HTML


def render(findings: Findings, work: Path, printed: bool = False) -> str:
    """The page.

    Args:
        findings: of the scene.
        work: folder with `date-0.png`, ...: pictures of the dates, of one size.
        printed: for paper: both dates side by side in place of the map with a swipe.
    """
    side = PRINTED_SIDE if printed else int(SIDE * min(1.0, (2 / len(findings.dates)) ** 0.5))
    pictures = [_picture(work / f"date-{number}.png", side) for number in range(len(findings.dates))]
    width, height = pictures[0][1]
    outlines = {change.id: outline(change.polygon, findings.grid, width) for change in findings.changes}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number}
    return environment.get_template("report.html").render(
        findings=findings,
        printed=printed,
        listed=findings.changes[: PRINTED_ROWS if printed else None],
        width=width,
        height=height,
        pictures=[uri for uri, _ in pictures],
        outlines=outlines,
        colours={label: "#" + bytes(colour(findings, label)).hex() for label in findings.labels.values()},
        totals=totals(findings),
        whole=size(findings, findings.changes),
        coverage=coverage(findings),
        seen_area=area(findings, findings.seen_pixels),
        crs=crs_name(findings.grid.crs),
        area_text=area_text,
        shifts=[asdict(shift) for shift in findings.shifts],
    )


def outline(polygon: BaseGeometry, grid: Grid, width: int) -> str:
    """A polygon as the path of an SVG.

    Args:
        polygon: in coordinates of the grid's CRS.
        grid: of the scene.
        width: of the picture of the grid over which it is drawn, px.
    """
    share = width / grid.width
    placed = scale(affine_transform(polygon, (~grid.transform).to_shapely()), share, share, origin=(0, 0))
    simple = simplify(placed, 0.5)
    rings: list[Any] = []
    for part in getattr(simple, "geoms", [simple]):
        rings += [part.exterior, *part.interiors]
    return "".join("M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in ring.coords[:-1]) + "Z" for ring in rings)


def area_text(row: dict[str, Any]) -> str:
    """An area for people, from its `area_m2` and `pixels`: "1,250 m²", "3.42 ha", "80 px"."""
    square_metres = row["area_m2"]
    if square_metres is None:
        return f"{number(row['pixels'])} px"
    if square_metres < SQUARE_METRES_PER_HECTARE:
        return f"{number(square_metres)} m²"
    return f"{square_metres / SQUARE_METRES_PER_HECTARE:,.2f} ha"


def number(value: float) -> str:
    """1234.5 -> "1,234"; below 10 with a decimal, if it is no count."""
    return f"{value:,.1f}" if isinstance(value, float) and value < 10 else f"{value:,.0f}"


def _picture(path: Path, side: int) -> tuple[str, tuple[int, int]]:
    """A picture, its longer side at most `side` px, as the address of a JPEG, and its width and height."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    image.thumbnail((side, side))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode(), image.size
