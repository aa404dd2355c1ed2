"""What the page takes, and what it refuses: files by their header, before anything decodes them."""

import os
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from kcfi.processing.reading_kcfi import TIFF_STARTS

RECEIVED = 300  # seconds within which a request must have come, and after which files of broken ones are deleted
BLOCK = 4096  # bytes that a small file takes, too
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")  # no others of PIL's decoders ever see an upload; GDAL reads TIFFs alone


@dataclass(frozen=True)
class Limits:
    """Limits of one page.

    Args:
        megabytes: of a request with files, 10^6 bytes.
        megapixels: of an image, and of the grid of a scene, 10^6 px.
        waiting: runs that may wait for the one that is computed.
        seconds: that a run may compute.
        stored_megabytes: of uploads and pictures on disk, and likewise of answers in memory; the oldest go first.
        stored_seconds: that a file stays on disk.
    """

    megabytes: float = 64
    megapixels: float = 5
    waiting: int = 8
    seconds: float = 180
    stored_megabytes: float = 1024
    stored_seconds: float = 3600


class Refused(Exception):
    """A request that is refused; the message is for whoever sent it.

    Args:
        status: of HTTP: 400, 403, 404, 408, 413, 415, 429 or 504.
        message: what was found, and what to do instead.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


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
        with Image.open(path, formats=FORMATS) as image:
            check_pixels(image.width, image.height, limits, "An image")
    except Image.DecompressionBombError as error:
        raise Refused(
            413, f"An image promises too many pixels: at most {limits.megapixels:g} Mpx are read."
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, KeyError) as error:
        with open(path, "rb") as file:
            if file.read(4) not in TIFF_STARTS:
                raise Refused(415, "Not an image that is read here: give PNG, JPEG, WebP or TIFF.") from error
        check_tiff(path, limits)  # of a kind that PIL does not know


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
    with open(path, "rb") as file:
        if file.read(4) not in TIFF_STARTS:  # whose zero byte also ends GDAL's search for other formats inside
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


def check_pixels(width: int, height: int, limits: Limits, what: str) -> None:
    """Refuse a large image or grid.

    Raises:
        Refused: 413; says both numbers.
    """
    if width * height > limits.megapixels * 1e6:
        raise Refused(
            413,
            f"{what} of {width:,} x {height:,} px is more than this page takes, {limits.megapixels:g} Mpx: cut out a "
            "part of it, or use `kcfi caption` or `kcfi scene` on a machine of your own.",
        )


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
