"""Files, PIL images and arrays -> 8-bit RGB, as the model sees them: `read_image`, and `read_pair` for both dates.

What becomes what stands in the table of `KCFIImageProcessor`.
"""

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import (
    load_image,
)

EXIF_ORIENTATION = 0x0112
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # one band of more than 8 bits

READING = ("bands", "stretch", "max_image_pixels")  # settings of how a file becomes 8-bit RGB
MAX_IMAGE_PIXELS = 178_956_970  # what PIL refuses as a decompression bomb when it is left alone

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # also of BigTIFF
SAMPLES_PER_PIXEL, BITS_PER_SAMPLE, EXTRA_SAMPLES, GDAL_NODATA = 277, 258, 338, 42113  # tags of a TIFF
PREMULTIPLIED, ALPHA = 1, 2  # values of EXTRA_SAMPLES: alpha that PIL divides the colours by, and plain alpha
MOST_BETWEEN = 0.5  # of an alpha of a TIFF may be neither clear nor opaque
GDAL_DRIVERS = {"TIFF": "GTiff", "PNG": "PNG", "JPEG2000": "JP2OpenJPEG"}  # no VRT, whose sources may be anywhere

WHICH_BANDS = (
    "give the numbers of those that are, counted from 1: bands=[1, 2, 3] in Python, `--bands 1 2 3` of `kcfi caption` "
    "(or write a file of these three: gdal_translate -b 1 -b 2 -b 3)"
)

_OPENING = threading.Lock()  # for what is global to the process: PIL's limit, the filters of warnings


class InputError(ValueError):
    """Bad input: the message says what was found, where, and how to put it right; `kcfi` prints it as one line."""


@contextmanager
def refusing(message: str) -> Iterator[None]:
    """Around what decodes a file or takes its content apart: whatever that raises is the file's fault, not a bug.

    A file may hold anything, and what libraries raise then is in no documentation: a broken EXIF block of a PNG is a
    `SyntaxError`, brackets nested too deep are a `RecursionError`. So only such code belongs into it.

    Args:
        message: what cannot be read, and as what; the reason is put behind it.

    Raises:
        InputError: for all but what passes: an `InputError`, a `FileNotFoundError` that names its file, a
            `MemoryError`, and a `NameError` or an `AttributeError` in a line of this project, which is a bug.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except (NameError, AttributeError) as error:
        if _is_ours(error):
            raise
        raise InputError(f"{message} ({type(error).__name__}: {error}).") from error
    except Exception as error:
        if isinstance(error, FileNotFoundError) and error.filename:
            raise
        reason = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{message} ({reason}).") from error


def _is_ours(error: Exception) -> bool:
    """Whether the line that raised an error is one of this package; of a copy beside a model: of its folder."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] == __name__.split(".")[0]


def file_note(image: Any) -> str:
    """The file that a PIL image was read from, in brackets, for messages."""
    name = getattr(image, "filename", "")
    return f" ({name})" if name else ""


def is_url(source: Any) -> bool:
    """Whether an image is named by a URL (http, https, data)."""
    return isinstance(source, str) and source.startswith(("http://", "https://", "data:"))


def check_reading(
    bands: Sequence[int] | None = None,
    stretch: Sequence[float] | None = None,
    max_image_pixels: int | None = MAX_IMAGE_PIXELS,
) -> None:
    """Check settings of `read_image`.

    Raises:
        InputError: not three bands from 1 on, not two rising percentiles from 0 to 100, or no pixels.
    """
    if bands is not None and (len(bands) != 3 or min(bands) < 1):
        raise InputError(
            f"bands={list(bands)} must be three numbers from 1 on: which bands are red, green and blue, as [1, 2, 3]."
        )
    if stretch is not None and (len(stretch) != 2 or not 0 <= stretch[0] < stretch[1] <= 100):
        raise InputError(f"stretch={list(stretch)} must be a low and a higher percentile from 0 to 100, as [2, 98].")
    if max_image_pixels is None or max_image_pixels < 1:
        raise InputError(f"max_image_pixels={max_image_pixels} must be at least 1.")


@contextmanager
def _without_pil_limit() -> Iterator[None]:
    """PIL without its own limit of pixels, which is one for the whole process: put back before anybody else reads."""
    with _OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_pixels(width: int, height: int, max_image_pixels: int, name: str) -> None:
    """Refuse a large image before its pixels are allocated."""
    if width * height > max_image_pixels:
        raise InputError(
            f"{name}: {width} x {height} px are more than max_image_pixels, {max_image_pixels}, which protects the "
            f"memory from files that promise too much. If this one is meant: `--max_image_pixels {width * height}` of "
            f"`kcfi caption`, max_image_pixels={width * height} in Python."
        )


def _open_header(path: str | Path, max_image_pixels: int) -> Image.Image | None:
    """Open an image whose pixels are not read yet; None: a TIFF of a kind that PIL does not know."""
    with refusing(f"{path}: cannot be read as an image"):
        try:
            with _without_pil_limit():
                image = Image.open(path)
        except (UnidentifiedImageError, KeyError):  # KeyError: a compression of TIFF
            with open(path, "rb") as file:
                if file.read(4) in TIFF_STARTS:
                    return None
            raise
    _check_pixels(*image.size, max_image_pixels, str(path))
    return image


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Decode an image that was opened, and turn it upright."""
    with refusing(f"{name}: cannot be read as an image"):
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 0):  # checked by whoever opened it
            with _without_pil_limit():
                image.load()
        else:
            image.load()
        if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
            image.filename = name  # type: ignore[attr-defined]  # for messages; the rotated copy has none
    return image


def open_image(source: str | Path | Image.Image, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Open and decode an image as its file holds it, upright: its EXIF rotation is applied. For masks.

    Args:
        source: path, URL (http, https, data) or PIL image.
        max_image_pixels: refuse files that have more, before they are decoded.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is not an image, is truncated or too large; the message names it.
    """
    if isinstance(source, Image.Image):
        return _decode(source, getattr(source, "filename", "the image"))
    if is_url(source):
        with refusing(f"{str(source)[:80]}: cannot be read as an image"):
            return load_image(str(source))
    image = _open_header(source, max_image_pixels)
    if image is None:
        raise InputError(f"{source}: cannot be read as an image (a TIFF of a kind that PIL does not know).")
    return _decode(image, str(source))


def read_image(
    source: Any,
    bands: Sequence[int] | None = None,
    stretch: Sequence[float] | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> Image.Image:
    """Read an image as the model sees it: upright, 8-bit RGB; see the table in `KCFIImageProcessor`.

    Args:
        source: path, URL, PIL image, array or tensor. PIL images of 8 bits, and what URLs give, are finished: `bands`
            and `stretch` do nothing to them.
        bands: which bands of a file are red, green and blue, counted from 1; all others, alpha too, are left out.
        stretch: low and high percentile (0 to 100) that become black and white, of each band of each image by itself.
        max_image_pixels: refuse files that have more, before they are decoded.

    Returns:
        Image of mode "RGB", fully loaded.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is not an image, is truncated or too large; it is not known which of its bands are the
            colours, or which values black and white; or a setting is wrong. Names the file and the remedy.
    """
    check_reading(bands, stretch, max_image_pixels)
    if not isinstance(source, (str, Path, Image.Image)):
        values = to_numpy(eight_bit(channels_first(source, bands, None), stretch))
        return Image.fromarray(
            np.ascontiguousarray(np.broadcast_to(values, (3, *values.shape[1:])).transpose(1, 2, 0))
        )
    if isinstance(source, Image.Image) or is_url(source):
        name = str(getattr(source, "filename", ""))
        if isinstance(source, Image.Image) and _pil_reads_less(source):
            raise InputError(
                f"{name or 'The image'}: PIL gives 8 bits of each of its colours, or not all of its bands: give the "
                "path of the file instead."
            )
        image = open_image(source)
        if image.mode in EIGHT_BIT_MODES:
            _check_alpha_of_tiff(image, name)
            return _rgb(image)
        return _pil_raster(image, None, name).show(stretch)
    header = _open_header(source, max_image_pixels)
    premultiplied = PREMULTIPLIED in getattr(header, "tag_v2", {}).get(EXTRA_SAMPLES, ())
    if (
        header is None
        or _pil_reads_less(header)
        or (header.format == "JPEG2000" and len(header.getbands()) > 1)  # PIL halves 16 bits, takes a 4th for alpha
        or (premultiplied and bands is not None)
    ):
        if premultiplied and bands is None:
            raise InputError(f"{source}: its colours are multiplied by its alpha; to take them so, {WHICH_BANDS}.")
        driver = "GTiff" if header is None else GDAL_DRIVERS[str(header.format)]
        return _gdal_raster(Path(source), driver, bands, max_image_pixels).show(stretch)
    image = _decode(header, str(source))
    if bands is None:
        _check_alpha_of_tiff(image, str(source))
        if stretch is None and image.mode in EIGHT_BIT_MODES and _nodata(image) is None:
            return _rgb(image)
    return _pil_raster(image, bands, str(source)).show(stretch)


def read_pair(before: Any, after: Any, **settings: Any) -> tuple[Image.Image, Image.Image]:
    """Read both dates by `read_image`; the two may be files of different kinds.

    Args:
        before: path, URL, PIL image, array or tensor.
        after: the same.
        **settings: of `read_image`. Each date gets a stretch of its own.

    Raises:
        FileNotFoundError: no such file.
        InputError: an image that `read_image` refuses, or the sizes differ; names the files.
    """
    first, second = (read_image(source, **settings) for source in (before, after))
    if first.size != second.size:
        names = [f"{source} is " if isinstance(source, str | Path) else "" for source in (before, after)]
        raise InputError(
            f"The images differ in size: {names[0]}{first.width} x {first.height} px, "
            f"{names[1]}{second.width} x {second.height} px. They must show one place, pixel by pixel: crop or "
            "resample one of them."
        )
    return first, second


def _rgb(image: Image.Image) -> Image.Image:
    """An image of 8 bits in RGB, its transparency over white; the image itself if it is that already."""
    if type(image) is Image.Image and image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    with refusing(f"The colours of the image{file_note(image)} cannot be read"):  # a palette may be broken
        return Image.fromarray(np.asarray(convert_to_rgb(image, return_numpy=True)))


def _pil_reads_less(image: Image.Image) -> bool:
    """Whether PIL drops bands of a TIFF, or halves the 16 bits of colours, without a word."""
    bands = len(image.getbands())
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        return tags.get(SAMPLES_PER_PIXEL, 1) > bands or (bands > 1 and max(tags.get(BITS_PER_SAMPLE, (8,))) > 8)
    return image.format == "PNG" and bands > 1 and any(";16" in str(tile[3]) for tile in image.tile)  # type: ignore[attr-defined]


def _nodata(image: Image.Image) -> float | None:
    """The value of pixels without data of a GeoTIFF that PIL opened; an index of a palette is none."""
    text = getattr(image, "tag_v2", {}).get(GDAL_NODATA)
    try:
        return None if text is None or image.mode in ("P", "PA") else float(text.strip(" \0"))
    except ValueError:
        return None  # GDAL does not understand it either


def _check_alpha_of_tiff(image: Image.Image, name: str) -> None:
    """Refuse a band of a TIFF that PIL takes for alpha, if the file does not declare it so or it can hardly be one."""
    tags = getattr(image, "tag_v2", None)
    if tags is None or "A" not in image.getbands():
        return
    if not set(tags.get(EXTRA_SAMPLES, ())) & {PREMULTIPLIED, ALPHA}:
        choose_bands(len(image.getbands()), None, name)
    check_alpha(np.asarray(image.getchannel("A")) / 255, name)


def check_alpha(alpha: np.ndarray, name: str) -> None:
    """Refuse an alpha (H, W), 0 to 1, of a TIFF that can hardly be one.

    GDAL declares the fourth band of 8 bits as alpha unless it is told otherwise, and so does everything that writes
    with it: files of red, green, blue and near infrared, too.
    """
    between = float(((alpha > 0) & (alpha < 1)).mean())
    if between > MOST_BETWEEN:
        raise InputError(
            f"{name or 'The image'}: its last band is declared as alpha, but {between:.0%} of it are neither clear "
            "nor opaque, as if it were near infrared, which GDAL declares so too. It is not known which bands are "
            f"red, green and blue: {WHICH_BANDS}."
        )


def choose_bands(count: int, bands: Sequence[int] | None, name: str) -> list[int]:
    """Positions, from 0, of the bands to show: the three of `bands`, or all where there are one or three.

    Raises:
        InputError: another number of bands and no `bands`, or one that is not there.
    """
    if bands is None and count not in (1, 3):
        raise InputError(
            f"{name or 'The image'} has {count} bands, and nothing says which are red, green and blue: {WHICH_BANDS}."
        )
    if bands is not None and max(bands) > count:
        raise InputError(
            f"{name or 'The image'} has {count} band{'s' * (count > 1)}: bands={list(bands)} asks for another."
        )
    return list(range(count)) if bands is None else [band - 1 for band in bands]


@dataclass
class _Raster:
    """The bands of an image that are to be shown, before they become 8 bits.

    Attributes:
        values: (1 or 3, H, W): grey, or red, green and blue.
        name: of the file, for messages.
        kind: of the values, for messages.
        alpha: (H, W) from 0 to 1; None where all is opaque.
        nodata: value of pixels without data; None if there is none.
    """

    values: np.ndarray
    name: str
    kind: str
    alpha: np.ndarray | None = None
    nodata: float | None = None

    def show(self, stretch: Sequence[float] | None) -> Image.Image:
        """RGB of 8 bits: stretched or as they are; black without data, white where transparent."""
        values, alpha, known = self.values, self.alpha, np.ones(self.values.shape[1:], np.bool_)
        if self.nodata is not None:
            known = ~(np.isnan(values) if np.isnan(self.nodata) else values == self.nodata).all(0)
            values = np.where(known, values, values.dtype.type(0))
        if stretch is None:
            shown = _to_eight_bit(values, self.name, self.kind, trust_integers=False)
        else:
            shown = stretched(values, stretch, known if alpha is None else known & (alpha > 0))
            shown = np.where(known, shown, np.uint8(0))
        if alpha is not None:
            shown = np.rint(shown * alpha + 255 * (1 - alpha)).astype(np.uint8)
        colours = np.broadcast_to(shown, (3, *known.shape))
        return Image.fromarray(np.ascontiguousarray(colours.transpose(1, 2, 0)))


def _pil_raster(image: Image.Image, bands: Sequence[int] | None, name: str) -> _Raster:
    """The bands of an image that PIL decoded."""
    kind, nodata = f"mode {image.mode!r}", _nodata(image)
    if image.mode in WIDE_MODES:
        return _Raster(np.asarray(image)[None][choose_bands(1, bands, name)], name, kind, None, nodata)
    if image.mode not in EIGHT_BIT_MODES:
        raise _unclear(np.asarray(image), name, kind)
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if image.mode not in ("LA", "RGBA") and (transparent or image.mode not in ("L", "RGB")):
        with refusing(f"{name}: its colours cannot be read"):  # a palette may be broken
            image = image.convert("RGBA" if transparent else "RGB")
    values = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
    if bands is None and transparent:
        return _Raster(values[:-1], name, kind, values[-1] / 255, nodata)
    return _Raster(values[choose_bands(len(values), bands, name)], name, kind, None, nodata)


def _gdal_raster(path: Path, driver: str, bands: Sequence[int] | None, max_image_pixels: int) -> _Raster:
    """The bands of a file that PIL does not read whole."""
    try:
        import rasterio
        from rasterio.enums import ColorInterp
        from rasterio.errors import NotGeoreferencedWarning
    except ImportError as error:
        raise InputError(
            f'{path}: PIL does not read all of its bands and bits. rasterio does: pip install "kcfi[geo]"'
        ) from error
    with refusing(f"{path}: cannot be read as an image"):
        with _OPENING, warnings.catch_warnings(), rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # the place on the ground is not asked for
            file = rasterio.open(path.absolute(), driver=driver)
        with file:
            _check_pixels(file.width, file.height, max_image_pixels, str(path))
            colours = [band for band in file.indexes if file.colorinterp[band - 1] != ColorInterp.alpha]
            if bands is None:
                chosen = [colours[position] for position in choose_bands(len(colours), None, str(path))]
            else:
                chosen = [position + 1 for position in choose_bands(file.count, bands, str(path))]
            values, nodata, alpha = file.read(chosen), file.nodata, None
            if bands is None and len(colours) < file.count:
                band = file.colorinterp.index(ColorInterp.alpha) + 1
                alpha = file.read(band)
                alpha = alpha / (np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1)
                check_alpha(alpha, str(path))
    return _Raster(values, str(path), f"dtype {values.dtype}", alpha, nodata)


def stretched(values: np.ndarray, stretch: Sequence[float], known: np.ndarray | None = None) -> np.ndarray:
    """Stretch each band linearly to 8 bits between two of its own percentiles.

    Args:
        values: (C, H, W), real numbers.
        stretch: percentiles (0 to 100) that become 0 and 255; what lies beyond them is clipped.
        known: (H, W), False where a pixel does not count; NaN and infinite values never do.

    Returns:
        uint8 (C, H, W); NaN and infinite values are black, and so is a band of one value.

    Raises:
        InputError: the values are no real numbers.
    """
    if values.dtype.kind not in "biuf":
        raise InputError(f"Values of dtype {values.dtype} cannot be stretched: give real numbers.")
    shown = np.zeros(values.shape, np.uint8)
    for band, rows in zip(values, shown, strict=True):
        finite = np.isfinite(band)
        counted = band[finite if known is None else finite & known]
        if not counted.size:
            continue
        # "nearest" takes values that occur: the difference of two of them may not fit into their type
        low, high = (float(value) for value in np.percentile(counted, stretch, method="nearest"))
        high = high if high > low else float(np.nextafter(low, np.inf))
        for row, line, valid in zip(rows, band, finite, strict=True):  # all rows at once would take 8 bytes a pixel
            row[valid] = np.rint(np.interp(line[valid], (low, high), (0, 255)))
    return shown


def unstack(images: Any) -> Any:
    """Turn stacked arrays (N, C, H, W) or (B, 2, C, H, W), at any depth of nested lists, into lists of images."""
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) > 3:
        return [unstack(image) for image in images]
    return images


def channels_are_first(shape: Sequence[int]) -> bool:
    """Whether an array of three axes is (C, H, W) rather than (H, W, C).

    The channels are the first axis, or else the last, with 1 or 3 entries; without one the shorter of the two.

    Raises:
        InputError: it cannot be told.
    """
    first, last = shape[0], shape[-1]
    if len(shape) == 3 and (first in (1, 3) or last in (1, 3)):
        return first in (1, 3)
    if len(shape) != 3 or first == last:
        raise InputError(
            f"An array of shape {tuple(shape)}: it cannot be told which axis holds the channels. Give (C, H, W) or "
            "(H, W, C) with fewer channels than pixels a side, or say input_data_format='channels_first' or "
            "'channels_last'."
        )
    return first < last


def channels_first(image: Any, bands: Sequence[int] | None, input_data_format: str | None) -> Any:
    """An array or tensor of any layout -> the channels to show (1 or 3, H, W)."""
    if image.ndim == 2:
        image = image[None]
    elif not (channels_are_first(image.shape) if input_data_format is None else input_data_format == "channels_first"):
        image = image.permute(2, 0, 1) if isinstance(image, torch.Tensor) else image.transpose(2, 0, 1)
    chosen = choose_bands(len(image), bands, f"An array of shape {tuple(image.shape)} (channels first)")
    return image if bands is None else image[chosen]


def to_numpy(array: Any) -> np.ndarray:
    """An array or tensor -> the same values as an array."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = array.float() if array.dtype == torch.bfloat16 else array  # numpy has no bfloat16
    return np.asarray(array)


def eight_bit(image: Any, stretch: Sequence[float] | None = None) -> Any:
    """An array or tensor (C, H, W) in 8-bit values; see the table in `KCFIImageProcessor`.

    Args:
        image: (C, H, W).
        stretch: as in `read_image`.

    Raises:
        InputError: values whose black and white are not known; the message says which and what to do.
    """
    if stretch is not None:
        return stretched(to_numpy(image), stretch)
    if str(image.dtype) in ("uint8", "torch.uint8"):
        return image
    return _to_eight_bit(to_numpy(image), "", f"dtype {image.dtype}", trust_integers=True)


def _to_eight_bit(values: np.ndarray, name: str, kind: str, trust_integers: bool) -> np.ndarray:
    """Values in 8 bits, without a stretch.

    Args:
        values: of any shape.
        name: of the file, for messages.
        kind: of the values, for messages.
        trust_integers: take wide integers that are all from 0 to 255 for 8 bits. Not of files: those of another date
            would be refused for one bright pixel.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * 255
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:  # a NaN fails both
        return np.rint(values * 255).astype(np.uint8)
    if trust_integers and values.dtype.kind in "iu" and values.dtype != np.uint16 and low >= 0 and high <= 255:
        return values.astype(np.uint8)
    raise _unclear(values, name, kind)


def _unclear(values: np.ndarray, name: str, kind: str) -> InputError:
    """The error for values whose black and white are not known."""
    return InputError(
        f"An image{f' ({name})' if name else ''} of {kind} with values from {values.min()} to {values.max()} is not "
        "understood: give RGB or grey of 8 bits (0 to 255), or floats from 0 to 1. Wider data has no fixed black and "
        "white; have it stretched: stretch=[2, 98] in Python, `--stretch 2 98` of `kcfi caption`. Each date then gets "
        "its own: its 2nd percentile becomes black, its 98th white, band by band."
    )
