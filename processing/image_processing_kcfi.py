"""KCFIImageProcessor: before/after pairs and their masks -> tensors through one geometry, and masks back again.

`read_image` turns a file or a PIL image into 8-bit RGB, and `read_pair` both dates; see the table in the class.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn import functional as F
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    PILImageResampling,
    SizeDict,
    is_valid_image,
    load_image,
)
from transformers.processing_utils import ImagesKwargs

NO_LABEL = 255  # class id of pixels without a label, and of pixels the model did not see
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


def _file(image: Any) -> str:
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
    try:
        with _without_pil_limit():
            image = Image.open(path)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, KeyError) as error:  # KeyError: a compression of TIFF
        if isinstance(error, UnidentifiedImageError | KeyError):
            with open(path, "rb") as file:
                if file.read(4) in TIFF_STARTS:
                    return None
        raise InputError(f"{path}: cannot be read as an image ({error}).") from error
    _check_pixels(*image.size, max_image_pixels, str(path))
    return image


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Decode an image that was opened, and turn it upright."""
    try:
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 0):  # checked by whoever opened it
            with _without_pil_limit():
                image.load()
        else:
            image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # a broken PNG may be a SyntaxError
        raise InputError(f"{name}: cannot be read as an image ({error}).") from error
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
        values = _numpy(eight_bit(_channels_first(source, bands, None), stretch))
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
        _choose(len(image.getbands()), None, name)
    _check_alpha(np.asarray(image.getchannel("A")) / 255, name)


def _check_alpha(alpha: np.ndarray, name: str) -> None:
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


def _choose(count: int, bands: Sequence[int] | None, name: str) -> list[int]:
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
        return _Raster(np.asarray(image)[None][_choose(1, bands, name)], name, kind, None, nodata)
    if image.mode not in EIGHT_BIT_MODES:
        raise _unclear(np.asarray(image), name, kind)
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if image.mode not in ("LA", "RGBA") and (transparent or image.mode not in ("L", "RGB")):
        image = image.convert("RGBA" if transparent else "RGB")
    values = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
    if bands is None and transparent:
        return _Raster(values[:-1], name, kind, values[-1] / 255, nodata)
    return _Raster(values[_choose(len(values), bands, name)], name, kind, None, nodata)


def _gdal_raster(path: Path, driver: str, bands: Sequence[int] | None, max_image_pixels: int) -> _Raster:
    """The bands of a file that PIL does not read whole."""
    try:
        import rasterio
        from rasterio.enums import ColorInterp
        from rasterio.errors import NotGeoreferencedWarning, RasterioError
    except ImportError as error:
        raise InputError(
            f'{path}: PIL does not read all of its bands and bits. rasterio does: pip install "kcfi[geo]"'
        ) from error
    try:
        with _OPENING, warnings.catch_warnings(), rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # the place on the ground is not asked for
            file = rasterio.open(path.absolute(), driver=driver)
        with file:
            _check_pixels(file.width, file.height, max_image_pixels, str(path))
            colours = [band for band in file.indexes if file.colorinterp[band - 1] != ColorInterp.alpha]
            if bands is None:
                chosen = [colours[position] for position in _choose(len(colours), None, str(path))]
            else:
                chosen = [position + 1 for position in _choose(file.count, bands, str(path))]
            values, nodata, alpha = file.read(chosen), file.nodata, None
            if bands is None and len(colours) < file.count:
                band = file.colorinterp.index(ColorInterp.alpha) + 1
                alpha = file.read(band)
                alpha = alpha / (np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1)
                _check_alpha(alpha, str(path))
    except RasterioError as error:
        raise InputError(f"{path}: cannot be read as an image ({error}).") from error
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


def image_size(image: Any) -> tuple[int, int]:
    """Height and width of a PIL image or an array (H, W), (C, H, W) or (H, W, C); see `channels_are_first`."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    if image.ndim == 3 and channels_are_first(image.shape):
        return image.shape[1], image.shape[2]
    return image.shape[0], image.shape[1]


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


def _channels_first(image: Any, bands: Sequence[int] | None, input_data_format: str | None) -> Any:
    """An array or tensor of any layout -> the channels to show (1 or 3, H, W)."""
    if image.ndim == 2:
        image = image[None]
    elif not (channels_are_first(image.shape) if input_data_format is None else input_data_format == "channels_first"):
        image = image.permute(2, 0, 1) if isinstance(image, torch.Tensor) else image.transpose(2, 0, 1)
    chosen = _choose(len(image), bands, f"An array of shape {tuple(image.shape)} (channels first)")
    return image if bands is None else image[chosen]


def _numpy(array: Any) -> np.ndarray:
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
        return stretched(_numpy(image), stretch)
    if str(image.dtype) in ("uint8", "torch.uint8"):
        return image
    return _to_eight_bit(_numpy(image), "", f"dtype {image.dtype}", trust_integers=True)


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


class KCFIImagesKwargs(ImagesKwargs, total=False):
    """Settings of `read_image`, beside those of transformers."""

    bands: list[int] | tuple[int, ...] | None
    stretch: list[int | float] | tuple[int | float, ...] | None
    max_image_pixels: int


class KCFIPairProcessing(BaseImageProcessor):
    """What both backends share: structure, conversion to 8 bits, masks, and the way back to the input's size."""

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 256, "width": 256}  # noqa: RUF012 (settings of image processors are class attributes)
    crop_size = {"height": 224, "width": 224}  # noqa: RUF012
    do_resize = True
    do_center_crop = False
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    bands = None
    stretch = None
    max_image_pixels = MAX_IMAGE_PIXELS
    valid_kwargs = KCFIImagesKwargs

    stack: Callable[[list[Any]], Any]

    def preprocess(self, images: Any, segmentation_maps: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare images or pairs, and masks with the same geometry (nearest neighbour).

        Args:
            images: a list of `[before, after]` pairs, or a list of images; PIL images, paths, arrays or tensors, also
                stacked. The two images of a pair have the same size, and may be of different kinds; pairs may differ.
            segmentation_maps: a mask per pair (or per image) at its size: class ids, 255 = no label, as PIL image of
                mode L, P or 1, or as array or tensor (H, W). None in the place of a mask = no label anywhere.
            **kwargs: settings that replace the processor's own, and `return_tensors`.

        Returns:
            `pixel_values` (B, 2, C, H, W) for pairs, (N, C, H, W) for images; `mask_labels` (B, H, W) int64 if there
            are masks.

        Raises:
            ValueError: images that cannot be read or converted, a pair of different sizes, a mask of another size.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        check_reading(**{name: kwargs[name] for name in READING if name in kwargs})
        return super()._standardize_kwargs(**kwargs)

    def reading(self, **settings: Any) -> dict[str, Any]:
        """The settings of `read_image`: those among `settings`, the processor's own for the rest."""
        return {name: settings.get(name, getattr(self, name)) for name in READING}

    def fetch_images(self, images: Any, **settings: Any) -> Any:  # type: ignore[override]
        """Read paths, URLs and PIL images into upright 8-bit RGB, at any depth of nested lists; arrays pass.

        Args:
            images: to read.
            **settings: of `read_image` (others are left aside), instead of the processor's own.
        """
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image, **settings) for image in images]
        if not isinstance(images, (str, Path, Image.Image)):
            return images
        image = read_image(images, **self.reading(**settings))
        if image is not images and not is_url(images):
            name = getattr(images, "filename", "") if isinstance(images, Image.Image) else str(images)
            image.filename = name  # type: ignore[attr-defined]  # for messages
        return image

    def process_image(
        self,
        image: Any,
        do_rescale: bool | None = None,
        bands: Sequence[int] | None = None,
        stretch: Sequence[float] | None = None,
        input_data_format: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """An image -> array (C, H, W) of the backend."""
        if not is_valid_image(image):
            raise TypeError(f"{type(image).__name__} is not an image: give a path, PIL image, array or tensor.")
        if isinstance(image, Image.Image):
            return super().process_image(read_image(image, bands, stretch), **kwargs)
        image = _channels_first(image, bands, input_data_format)
        if do_rescale:  # without, arrays are taken as they are
            image = eight_bit(image, stretch)
        return super().process_image(image, input_data_format="channels_first", **kwargs)

    def center_crop(self, image: Any, size: SizeDict, **kwargs: Any) -> Any:  # type: ignore[override]
        """Crop the centre.

        Raises:
            ValueError: the image is smaller than the crop; padding would add ground that nobody photographed.
        """
        height, width = image.shape[-2:]
        if height < size.height or width < size.width:
            raise InputError(
                f"crop_size {size.width} x {size.height} is larger than the resized image, {width} x {height} px: "
                "make `size` at least as large as `crop_size`."
            )
        return super().center_crop(image, size, **kwargs)  # type: ignore[arg-type]

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self, images: Any, segmentation_maps: Any, return_tensors: Any = None, **kwargs: Any
    ) -> BatchFeature:
        images = unstack(self.fetch_images(images, **kwargs))
        images = images if isinstance(images, list) else [images]
        pairs = any(isinstance(image, list) for image in images)
        if not images or (pairs and any(not isinstance(pair, list) or len(pair) != 2 for pair in images)):
            counts = [len(image) if isinstance(image, list) else 1 for image in images]
            raise InputError(
                f"Expected images, or [before, after] pairs of two images each; the groups have {counts} images."
            )
        sources = [image for pair in images for image in pair] if pairs else images
        flat = [self.process_image(image, **kwargs) for image in sources]
        if pairs:
            for first in range(0, len(flat), 2):
                before, after = first, first + 1
                _check_same_size(("before", sources[before], flat[before]), ("after", sources[after], flat[after]))

        pixel_values = self._preprocess(flat, return_tensors=None, **kwargs).pixel_values
        if pairs:
            pixel_values = [self.stack(list(pixel_values[i : i + 2])) for i in range(0, len(pixel_values), 2)]
        data = {"pixel_values": pixel_values}
        if segmentation_maps is not None:
            step = 2 if pairs else 1
            data["mask_labels"] = self._mask_labels(
                segmentation_maps, sources[::step], flat[::step], pixel_values[0].shape[-2:], **kwargs
            )
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _mask_labels(
        self, masks: Any, sources: list[Any], images: list[Any], output_size: Sequence[int], **kwargs: Any
    ) -> list[Any]:
        """Masks -> int64 class ids of the output's size (H, W), one per pair."""
        if isinstance(masks, (str, Path, Image.Image)) or getattr(masks, "ndim", 0) == 2:
            masks = [masks]
        limit = kwargs["max_image_pixels"]
        masks = [open_image(mask, limit) if isinstance(mask, (str, Path, Image.Image)) else mask for mask in masks]
        if len(masks) != len(images):
            raise InputError(
                f"{len(masks)} masks for {len(images)} images or pairs: give one each, or None in its place."
            )
        kwargs |= {"resample": PILImageResampling.NEAREST, "do_rescale": False, "do_normalize": False}
        labels = []
        for mask, source, image in zip(masks, sources, images, strict=True):
            if mask is None:
                labels.append(torch.full(tuple(output_size), NO_LABEL, dtype=torch.int64))
                continue
            ids = _class_ids(mask)[None]
            _check_same_size(("image", source, image), ("mask", mask, ids))
            prepared = super().process_image(ids, input_data_format="channels_first")
            label = self._preprocess([prepared], return_tensors="pt", **kwargs)
            labels.append(label.pixel_values[0, 0].to(torch.int64))
        return labels

    def post_process_masks(
        self, mask_logits: torch.Tensor, target_sizes: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """Bring the model's mask logits back to the size of the input images.

        Args:
            mask_logits: (B, classes, H, W).
            target_sizes: height and width of the input images, one per pair.

        Returns:
            A uint8 map (height, width) of class ids per pair: the likeliest class after bilinear resizing. After a
            centre crop the border that the model did not see is 255.

        Raises:
            ValueError: another number of sizes than of maps.
        """
        if len(mask_logits) != len(target_sizes):
            raise InputError(f"{len(target_sizes)} target_sizes for {len(mask_logits)} mask logits: give one each.")
        return [
            logits.argmax(0).masked_fill(~seen, NO_LABEL).to(torch.uint8)
            for logits, seen in self.post_process_maps(mask_logits, target_sizes)
        ]

    def post_process_maps(
        self, maps: torch.Tensor, target_sizes: Sequence[Sequence[int]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Bring maps of what the model sees, for example mask logits, back to the size of the input images.

        Args:
            maps: (B, C, H, W).
            target_sizes: height and width of the input images, one per pair.

        Returns:
            Per pair the map (C, height, width) in fp32, bilinearly resized, and where the model saw the image, bool
            (height, width): a centre crop leaves a border.
        """
        return [
            self._post_process_map(values.float(), int(height), int(width))
            for values, (height, width) in zip(maps, target_sizes, strict=True)
        ]

    def _post_process_map(self, values: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen = torch.ones_like(values[:1])
        if self.do_center_crop:
            (frame_height, frame_width), (top, left) = self._frame(height, width)
            bottom, right = frame_height - values.shape[-2] - top, frame_width - values.shape[-1] - left
            # zeros around the logits scale all classes alike where the resizing blends them in: same likeliest class
            values, seen = (F.pad(each, (left, right, top, bottom)) for each in (values, seen))
        values = F.interpolate(values[None], (height, width), mode="bilinear", align_corners=False)[0]
        seen = F.interpolate(seen[None], (height, width), mode="nearest-exact")[0, 0]
        return values, seen > 0

    def to_view(self, area: torch.Tensor) -> torch.Tensor:
        """An area of an input image, bool (height, width) -> the same area in what the model sees, bool (H, W)."""
        (height, width), (top, left) = self._frame(*area.shape)
        view = F.adaptive_max_pool2d(area[None].float(), (height, width))[0] > 0
        if not self.do_center_crop:
            return view
        return view[top : top + self.crop_size["height"], left : left + self.crop_size["width"]]

    def _frame(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Size (height, width) of an image after the resizing, and where (top, left) the centre crop in it begins."""
        frame = self._resized_size(height, width) if self.do_resize else (height, width)
        return frame, ((frame[0] - self.crop_size["height"]) // 2, (frame[1] - self.crop_size["width"]) // 2)

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of an image after the resizing and before the crop."""
        edge = self.size.get("shortest_edge")
        if edge is None:
            return self.size["height"], self.size["width"]
        short = min(height, width)
        return int(edge * height / short), int(edge * width / short)


def _class_ids(mask: Any) -> np.ndarray:
    """A mask -> uint8 class ids (H, W)."""
    if isinstance(mask, Image.Image) and mask.mode not in ("1", "L", "P"):
        raise InputError(f"A mask{_file(mask)} of mode {mask.mode!r} has no class ids: give one channel, mode 'L'.")
    ids = _numpy(mask)
    if ids.ndim == 3 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 2 or ids.dtype.kind not in "biu" or ids.min() < 0 or ids.max() > NO_LABEL:
        raise InputError(
            f"A mask{_file(mask)} of shape {ids.shape}, dtype {ids.dtype} and values {ids.min()} to {ids.max()} has "
            "no class ids: give integers of shape (H, W), 0 = background, 255 = no label."
        )
    return ids.astype(np.uint8)


def _check_same_size(*items: tuple[str, Any, Any]) -> None:
    """Refuse different sizes; an item is a name, the image as it came and its array (C, H, W)."""
    if len({tuple(array.shape[-2:]) for _, _, array in items}) == 1:
        return
    found = [f"{name}{_file(source)}: {array.shape[-1]} x {array.shape[-2]} px" for name, source, array in items]
    raise InputError(
        f"The sizes differ: {', '.join(found)}. Bring them to one pixel grid (co-register and resample) first."
    )


class KCFIImageProcessor(KCFIPairProcessing, TorchvisionBackend):  # type: ignore[misc]
    r"""Before/after pairs of images, and their masks, -> tensors for KCFI models (torchvision backend).

    Defaults: resize to 256 x 256 px (bicubic), scale to 0..1, normalise with ImageNet's statistics; no crop. For a
    pretrained tower set `image_mean` and `image_std` to its own (`KCFIProcessor.from_towers`).

    Converted to 8-bit RGB:

    | input | becomes |
    |---|---|
    | EXIF-rotated files | upright |
    | palette, grey, 1-bit, CMYK, YCbCr, HSV, boolean arrays | RGB |
    | alpha: PIL images LA, PA, RGBA; files that declare it | what shows over a white background |
    | arrays and files of floats from 0 to 1 | times 255 |
    | arrays of wider integers, except uint16, with values from 0 to 255 | as they are |
    | `bands`: arrays and files of three bands or more | those three; all others, alpha too, are left out |
    | `stretch`: arrays and files | each band from its low percentile (black) to its high one (white) |
    | pixels of a GeoTIFF without data (`nodata`); NaN and infinite values under a stretch | black |

    Everything else is refused by name. Another number of bands than one or three is, since nothing says which of them
    are red, green and blue: `bands=[1, 2, 3]` does, counted from 1. A TIFF declares alpha by its tag ExtraSamples; as
    GDAL declares any fourth band of 8 bits so, an alpha that is mostly neither clear nor opaque is refused as well.
    16 bits are refused, because satellites fill 10 to 14 of them, and over the full range the image would be almost
    black: `stretch=[2, 98]` chooses black and white from the values of each band, of each image by itself. It must be
    asked for, since the two dates of a pair are then shown unequally, as their own values ask for.

    Files of more than `max_image_pixels` are refused by what their header says. With `do_rescale=False` the values of
    arrays are taken as they are. PIL images of 8 bits are finished: `bands` and `stretch` do nothing to them.
    TIFF, PNG and JPEG 2000 files whose bands or bits PIL does not read whole need rasterio, `pip install "kcfi[geo]"`.

    Example:
        >>> processor = KCFIImageProcessor(size=224)
        >>> inputs = processor([["before.png", "after.png"]], segmentation_maps=["mask.png"], return_tensors="pt")
        >>> inputs["pixel_values"].shape, inputs["mask_labels"].shape
        ((1, 2, 3, 224, 224), (1, 224, 224))
    """

    stack = staticmethod(torch.stack)


class KCFIImageProcessorPil(KCFIPairProcessing, PilBackend):  # type: ignore[misc]
    """KCFIImageProcessor without torchvision: the same interface and, to rounding, the same pixels."""

    stack = staticmethod(np.stack)


__all__ = ["KCFIImageProcessor", "KCFIImageProcessorPil"]
