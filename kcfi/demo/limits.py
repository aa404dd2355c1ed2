"""What the page takes beside the limits of all servers: uploads alone, rasters by their header; old files go."""

import os
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kcfi.processing.reading_kcfi import TIFF_STARTS
from kcfi.web.limits import RECEIVED, Refused, RequestLimits, check_header, check_pixels

BLOCK = 4096  # bytes that a small file takes, too


@dataclass(frozen=True)
class Limits(RequestLimits):
    """Limits of one page; the pixels are also those of the grid of a scene.

    Args:
        stored_megabytes: of uploads and pictures on disk, and likewise of reports; the oldest go first.
        answer_megabytes: of answers in memory, 1 MB for a pair of 256 x 256 px; likewise.
        stored_seconds: that a file stays on disk.
    """

    stored_megabytes: float = 1024
    answer_megabytes: float = 256
    stored_seconds: float = 3600


def inside(folder: Path, path: str) -> bool:
    """Whether a path is that of a file in a folder; links count by where they lead."""
    try:
        resolved = Path(path).resolve()
        return resolved.is_relative_to(folder.resolve()) and resolved.is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def check_upload(folder: Path, path: object, limits: Limits) -> None:
    """Refuse what is no upload, no image, or too large; of the file its header alone is read.

    Raises:
        Refused: 403, 415 or 413.
    """
    if not isinstance(path, str) or not inside(folder, path):
        raise Refused(403, "Only files that were uploaded to this page are read, no addresses and no other paths.")
    try:
        check_header(path, limits)
    except Refused as refusal:
        if refusal.status != 415 or not is_tiff(path):
            raise
        check_tiff(path, limits)  # of a kind that PIL does not know


def is_tiff(path: str) -> bool:
    """Whether a file begins as a TIFF does."""
    with open(path, "rb") as file:
        return file.read(4) in TIFF_STARTS


def check_tiff(path: str, limits: Limits) -> None:
    """Refuse what is no TIFF, too large, or names other files; no driver of GDAL but its own sees the file.

    Raises:
        Refused: 415 or 413.
    """
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioError
    except ImportError as error:
        raise Refused(415, 'A TIFF of this kind is read where "kcfi[geo]" is installed: give a PNG.') from error
    if not is_tiff(path):  # whose zero byte also ends GDAL's search for other formats inside
        raise Refused(415, "A scene is two GeoTIFFs: convert the files (`gdal_translate -of GTiff`).")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path, driver="GTiff") as source:
                size, elsewhere = source.shape, source.tags(ns="OVERVIEWS")
    except (RasterioError, ValueError) as error:
        raise Refused(415, "The file cannot be read as a TIFF: give another, or a PNG.") from error
    if elsewhere:  # a file or an address, which GDAL would open to read the image reduced
        raise Refused(415, "The TIFF names other files as its overviews: write it anew with `gdal_translate -nomd`.")
    check_pixels(size[1], size[0], limits, "An image")


def sweep(folder: Path, limits: Limits) -> None:
    """Delete files that are too old, and the oldest until the rest is small enough; and folders that stay empty."""
    found = []
    now = time.time()
    for place, _, names in os.walk(folder, topdown=False):
        with suppress(OSError):  # not empty, or deleted meanwhile
            if Path(place) != folder and not names and os.stat(place).st_mtime < now - RECEIVED:
                os.rmdir(place)
        for name in names:
            path = Path(place, name)
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, max(status.st_size, BLOCK), path))
    total = sum(size for _, size, _ in found)
    for changed, size, path in sorted(found):
        kept = RECEIVED if path.parent == folder else limits.stored_seconds  # loose: came in part, or is being sent
        if total > limits.stored_megabytes * 1e6 or changed < now - kept:
            path.unlink(missing_ok=True)
            total -= size
