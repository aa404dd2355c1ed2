"""KCFIImageProcessor: before/after pairs and their masks -> tensors through one geometry, and masks back again."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
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
)
from transformers.processing_utils import ImagesKwargs

from .reading_kcfi import (
    MAX_IMAGE_PIXELS,
    READING,
    InputError,
    channels_first,
    check_reading,
    eight_bit,
    file_note,
    is_url,
    open_image,
    read_image,
    to_numpy,
    unstack,
)

NO_LABEL = 255  # class id of pixels without a label, and of pixels the model did not see


class KCFIImageProcessorKwargs(ImagesKwargs, total=False):
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
    valid_kwargs = KCFIImageProcessorKwargs

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
        image = channels_first(image, bands, input_data_format)
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
        raise InputError(
            f"A mask{file_note(mask)} of mode {mask.mode!r} has no class ids: give one channel, mode 'L'."
        )
    ids = to_numpy(mask)
    if ids.ndim == 3 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 2 or ids.dtype.kind not in "biu" or ids.min() < 0 or ids.max() > NO_LABEL:
        raise InputError(
            f"A mask{file_note(mask)} of shape {ids.shape}, dtype {ids.dtype} and values {ids.min()} to {ids.max()} "
            "has no class ids: give integers of shape (H, W), 0 = background, 255 = no label."
        )
    return ids.astype(np.uint8)


def _check_same_size(*items: tuple[str, Any, Any]) -> None:
    """Refuse different sizes; an item is a name, the image as it came and its array (C, H, W)."""
    if len({tuple(array.shape[-2:]) for _, _, array in items}) == 1:
        return
    found = [f"{name}{file_note(source)}: {array.shape[-1]} x {array.shape[-2]} px" for name, source, array in items]
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
