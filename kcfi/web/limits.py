"""What a server takes, and what it refuses: images by their header, before anything decodes them."""

from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

RECEIVED = 300  # seconds within which a request must have come
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")  # no others of PIL's decoders ever see an image that was sent


@dataclass(frozen=True)
class RequestLimits:
    """Limits of a server.

    Args:
        megabytes: of a request with files or images, 10^6 bytes.
        megapixels: of an image, 10^6 px.
        waiting: runs that may wait for the one that is computed.
        seconds: that a run may compute.
    """

    megabytes: float = 64
    megapixels: float = 5
    waiting: int = 8
    seconds: float = 180


class Refused(Exception):
    """A request that is refused; the message is for whoever sent it.

    Args:
        status: of HTTP: 400, 403, 404, 408, 413, 415, 429 or 504.
        message: what was found, and what to do instead.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def check_pixels(width: int, height: int, limits: RequestLimits, what: str) -> None:
    """Refuse a large image or grid.

    Raises:
        Refused: 413; says both numbers.
    """
    if width * height > limits.megapixels * 1e6:
        raise Refused(
            413,
            f"{what} of {width:,} x {height:,} px is more than is taken here, {limits.megapixels:g} Mpx: cut out a "
            "part of it, or use `kcfi caption` or `kcfi scene` on a machine of your own.",
        )


def check_header(source: str | Path | IO[bytes], limits: RequestLimits) -> None:
    """Refuse what is no image of `FORMATS`, or too large; its header alone is read.

    Raises:
        Refused: 415 or 413.
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
            check_pixels(image.width, image.height, limits, "An image")
    except Image.DecompressionBombError as error:
        raise Refused(
            413, f"An image promises too many pixels: at most {limits.megapixels:g} Mpx are read."
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, KeyError) as error:
        raise Refused(415, "Not an image that is read here: give PNG, JPEG, WebP or TIFF.") from error
