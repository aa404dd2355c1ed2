"""KCFIImageProcessor: before/after pairs and their masks -> tensors through one geometry, and masks back again."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    PILImageResampling,
    SizeDict,
    is_valid_image,
    load_image,
)

NO_LABEL = 255  # class id of pixels without a label, and of pixels the model did not see
EXIF_ORIENTATION = 0x0112
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


class InputError(ValueError):
    """Bad input: the message says what was found, where, and how to put it right; `kcfi` prints it as one line."""


def _file(image: Any) -> str:
    """The file that a PIL image was read from, in brackets, for messages."""
    name = getattr(image, "filename", "")
    return f" ({name})" if name else ""


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """Open and decode an image, upright: its EXIF rotation is applied.

    Args:
        source: path, URL (http, https, data) or PIL image.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is not an image or is truncated; the message names it.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        return load_image(source)
    name = getattr(source, "filename", "the image") if isinstance(source, Image.Image) else str(source)
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image.load()
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # the first three: broken PNGs
        raise InputError(f"{name}: cannot be read as an image ({error}).") from error
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
        image.filename = name  # type: ignore[attr-defined]  # for messages; the rotated copy has none
    return image


def unstack(images: Any) -> Any:
    """Turn stacked arrays (N, C, H, W) or (B, 2, C, H, W), at any depth of nested lists, into lists of images."""
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) > 3:
        return [unstack(image) for image in images]
    return images


def image_size(image: Any) -> tuple[int, int]:
    """Height and width of a PIL image or an array (H, W), (C, H, W) or (H, W, C) with 1, 3 or 4 channels C."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    if image.ndim == 3 and image.shape[0] in (1, 3, 4):
        return image.shape[1], image.shape[2]
    return image.shape[0], image.shape[1]


def _numpy(array: Any) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = array.float() if array.dtype == torch.bfloat16 else array  # numpy has no bfloat16
    return np.asarray(array)


def eight_bit(image: Any) -> Any:
    """An image in 8-bit values; see the table in `KCFIImageProcessor`.

    Raises:
        InputError: values whose black and white are not known; the message says which and what to do.
    """
    if isinstance(image, Image.Image):
        if image.mode in EIGHT_BIT_MODES:
            return image
        kind, values = f"mode {image.mode!r}", np.asarray(image)
        understood = image.mode == "F"
    else:
        if str(image.dtype) in ("uint8", "torch.uint8"):
            return image
        kind, values = f"dtype {image.dtype}", _numpy(image)
        understood = values.dtype != np.uint16
    low, high = values.min(), values.max()
    if understood and values.dtype.kind == "b":
        return values.astype(np.uint8) * 255
    if understood and values.dtype.kind == "f" and low >= 0 and high <= 1:  # a NaN fails both
        return np.rint(values * 255).astype(np.uint8)
    if understood and values.dtype.kind in "iu" and low >= 0 and high <= 255:
        return values.astype(np.uint8)
    raise InputError(
        f"An image{_file(image)} of {kind} with values from {low} to {high} is not understood: give RGB or grey of 8 "
        "bits (0 to 255), or floats from 0 to 1. Wider data has no fixed black and white: stretch it to 8 bits "
        "yourself, both dates with the same limits (data that fills 16 bits: divide by 257)."
    )


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

    stack: Callable[[list[Any]], Any]

    def preprocess(self, images: Any, segmentation_maps: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare images or pairs, and masks with the same geometry (nearest neighbour).

        Args:
            images: a list of `[before, after]` pairs, or a list of images; PIL images, paths, arrays or tensors, also
                stacked. The two images of a pair have the same size; pairs may differ.
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

    def fetch_images(self, images: Any) -> Any:
        """Open paths and URLs and turn images upright, at any depth of nested lists; arrays pass."""
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        return open_image(images) if isinstance(images, (str, Path, Image.Image)) else images

    def process_image(self, image: Any, do_rescale: bool | None = None, **kwargs: Any) -> Any:
        """An image -> array (C, H, W) of the backend."""
        if not is_valid_image(image):
            raise TypeError(f"{type(image).__name__} is not an image: give a path, PIL image, array or tensor.")
        if do_rescale or isinstance(image, Image.Image):  # without rescaling, arrays are taken as they are
            image = eight_bit(image)
        if not isinstance(image, Image.Image) and image.ndim == 2:
            image, kwargs["input_data_format"] = image[None], "channels_first"
        return super().process_image(image, **kwargs)

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
        images = unstack(self.fetch_images(images))
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
        masks = self.fetch_images(masks)
        if not isinstance(masks, list):
            masks = [masks] if isinstance(masks, Image.Image) or masks.ndim == 2 else list(masks)
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
            self._post_process_mask(logits.float(), int(height), int(width))
            for logits, (height, width) in zip(mask_logits, target_sizes, strict=True)
        ]

    def _post_process_mask(self, logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
        seen = torch.ones_like(logits[:1])
        if self.do_center_crop:
            crop_height, crop_width = self.crop_size["height"], self.crop_size["width"]
            frame_height, frame_width = self._resized_size(height, width) if self.do_resize else (height, width)
            top, left = (frame_height - crop_height) // 2, (frame_width - crop_width) // 2
            border = (left, frame_width - crop_width - left, top, frame_height - crop_height - top)
            # zeros around the logits scale all classes alike where the resizing blends them in: same likeliest class
            logits, seen = F.pad(logits, border), F.pad(seen, border)
        logits = F.interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)[0]
        seen = F.interpolate(seen[None], (height, width), mode="nearest-exact")[0, 0]
        return logits.argmax(0).masked_fill(seen == 0, NO_LABEL).to(torch.uint8)

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
    | alpha (LA, PA, RGBA, arrays with 4 channels) | what shows over a white background |
    | arrays and images (mode F) of floats from 0 to 1 | times 255 |
    | arrays of wider integers, except uint16, with values from 0 to 255 | as they are |

    Everything else is refused by name. That includes 16 bits (modes I and I;16, uint16), on purpose: satellites fill
    10 to 14 of them, so over the full range the image would be almost black, and a stretch chosen here would differ
    from tile to tile and from date to date. With `do_rescale=False` arrays are taken as they are.

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
