"""Caption and mask one pair of any size: the work of `kcfi caption`.

Images up to the model's input size are encoded in one pass. Larger ones are never squeezed, because a model knows
objects at the ground sampling distance it was trained at: they are cut into overlapping tiles, the tiles' scores are
blended, and the sentence is that of the tile which changed most (or there is one for every changed region).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from kcfi.training.arguments import model_source
from kcfi.training.levir_cc import MASK_BUILDING, MASK_ROAD

BATCH = 8  # tiles encoded at a time
OVERLAP = 0.25  # of a tile's side, at least, with each neighbour
MERGE = 8  # px: changed pixels closer than twice this belong to one region
MIN_REGION = 100  # px: smaller regions get no sentence (25 m2 at 0.5 m/px)

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass
class Region:
    """A changed region: its box in pixels (left, top, right, bottom), its changed pixels, its sentence."""

    box: Box
    pixels: int
    caption: str = ""


@dataclass
class ChangeReport:
    """What `describe` finds in a pair of H x W images.

    Args:
        caption: the sentence for the whole pair.
        mask: (H, W) uint8 class ids, 0 = no change; None without a change detection head.
        changed_fraction: share of changed pixels, 0 to 1; None without a head.
        key_changes: (H, W) norm of the key change features (the paper's Fig. 1), in the model's own units.
        regions: changed regions, largest first; empty unless they were asked for.
    """

    caption: str
    mask: NDArray[np.uint8] | None
    changed_fraction: float | None
    key_changes: NDArray[np.float32]
    regions: list[Region] = field(default_factory=list)


def load(name: str) -> tuple[Any, Any]:
    """Model (in evaluation mode, on the GPU if there is one) and processor of a folder, Hub id or "kcfi-tiny".

    Raises:
        ValueError: it cannot be loaded; says why.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        source = model_source(name)
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype="auto" if device.type == "cuda" else torch.float32
        )
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"Cannot load the model {name!r}: {str(error).splitlines()[0]}") from error
    return model.to(device).eval(), processor


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that cover `length` px evenly, overlapping by at least `OVERLAP`; [0] if one is enough."""
    count = 1 + max(0, int(np.ceil((length - tile) / (tile * (1 - OVERLAP)))))
    return [int(start) for start in np.linspace(0, max(0, length - tile), count).round()]


def taper(tile: int) -> torch.Tensor:
    """Weights (tile, tile) of a tile's pixels in the blend: 1 in the middle, falling towards the borders, never 0."""
    ramp = torch.minimum(torch.arange(tile) + 0.5, tile - torch.arange(tile) - 0.5)
    ramp = (ramp / (tile * OVERLAP)).clamp(max=1)
    return ramp[:, None] * ramp[None, :]


def changed_regions(mask: NDArray[np.uint8]) -> list[Region]:
    """Connected changed regions of a mask (H, W), largest first; gaps below 2 * `MERGE` px do not part them."""
    square = np.ones((2 * MERGE + 1,) * 2, bool)
    labels, _ = ndimage.label(ndimage.binary_dilation(mask > 0, square))
    labels[mask == 0] = 0
    regions = []
    for index, area in enumerate(ndimage.find_objects(labels), start=1):
        pixels = int((labels[area] == index).sum()) if area else 0
        if pixels >= MIN_REGION:
            rows, columns = area
            regions.append(Region((columns.start, rows.start, columns.stop, rows.stop), pixels))
    return sorted(regions, key=lambda region: -region.pixels)


class Describer:
    """Describes pairs with one model; `describe` is the entry point.

    Args:
        model: KCFIForConditionalGeneration.
        processor: its KCFIProcessor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.tile = model.config.image_size

    def describe(self, before: Image.Image, after: Image.Image, regions: bool = False) -> ChangeReport:
        """Caption and mask a pair.

        Args:
            before: any size and mode that the image processor takes.
            after: of the same size.
            regions: also write a sentence for every changed region; needs a change detection head.

        Raises:
            ValueError: sizes differ, or regions without a head.
        """
        if before.size != after.size:
            raise ValueError(
                f"The images differ in size, {before.width} x {before.height} and {after.width} x {after.height} px: "
                "they must show the same place, pixel by pixel. Crop or resample one of them."
            )
        if regions and self.model.model.change_detection_head is None:
            raise ValueError("This model has no change detection head: it cannot find regions.")
        boxes = self._boxes(before.width, before.height)
        scores, key_changes = self._blend(before, after, boxes)
        mask = None if scores is None else scores.argmax(0).to(torch.uint8).numpy()
        chosen = boxes[0] if mask is None else max(boxes, key=lambda box: int((_crop(mask, box) > 0).sum()))
        found = changed_regions(mask) if regions and mask is not None else []
        windows = [chosen, *(self._window(region.box, before.width, before.height) for region in found)]
        captions = list(self._captions(before, after, windows))
        for region, caption in zip(found, captions[1:], strict=True):
            region.caption = caption
        fraction = None if mask is None else float((mask > 0).mean())
        return ChangeReport(captions[0], mask, fraction, key_changes.numpy(), found)

    def _boxes(self, width: int, height: int) -> list[Box]:
        if max(width, height) <= self.tile:
            return [(0, 0, width, height)]
        return [
            (left, top, min(left + self.tile, width), min(top + self.tile, height))
            for top in tile_starts(height, self.tile)
            for left in tile_starts(width, self.tile)
        ]

    def _window(self, box: Box, width: int, height: int) -> Box:
        """The tile around the middle of a region, inside the image."""
        left = int(np.clip((box[0] + box[2] - self.tile) // 2, 0, max(0, width - self.tile)))
        top = int(np.clip((box[1] + box[3] - self.tile) // 2, 0, max(0, height - self.tile)))
        return left, top, min(left + self.tile, width), min(top + self.tile, height)

    def _pixels(self, before: Image.Image, after: Image.Image, boxes: list[Box]) -> torch.Tensor:
        """Model input (B, 2, 3, tile, tile) of boxes; what a box of a large image lacks is filled by reflection."""
        whole = max(before.size) <= self.tile
        pairs = [
            [image.crop(box) if whole else _reflect(image.crop(box), self.tile) for image in (before, after)]
            for box in boxes
        ]
        pixels = self.processor.image_processor(pairs, return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def _blend(
        self, before: Image.Image, after: Image.Image, boxes: list[Box]
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Mask logits (classes, H, W), None without a head, and norms of the key change features (H, W)."""
        config = self.model.config
        total = torch.zeros(config.num_change_classes + 1, before.height, before.width)
        weights = torch.zeros(before.height, before.width)
        shape = taper(self.tile)
        starts = range(0, len(boxes), BATCH)
        for start in tqdm(starts, desc="tiles", unit="batch", disable=len(boxes) <= BATCH):
            part = boxes[start : start + BATCH]
            features = self.model.get_image_features(pixel_values=self._pixels(before, after, part))
            grid = (config.image_size // config.patch_size,) * 2
            norms = features.last_hidden_state[..., : config.stage_width].float().norm(dim=-1).unflatten(1, grid)
            maps = [F.interpolate(norms[:, None], size=(self.tile,) * 2, mode="bilinear")]
            if features.mask_logits is not None:
                maps.insert(0, features.mask_logits.float())
            for box, values in zip(part, torch.cat(maps, dim=1).cpu(), strict=True):
                width, height = box[2] - box[0], box[3] - box[1]
                if max(before.size) <= self.tile:
                    values = F.interpolate(values[None], size=(height, width), mode="bilinear")[0]
                weight = shape[:height, :width]
                area = (slice(box[1], box[3]), slice(box[0], box[2]))
                total[(slice(0, len(values)), *area)] += values[:, :height, :width] * weight
                weights[area] += weight
        total /= weights
        if self.model.model.change_detection_head is None:
            return None, total[0]
        return total[:-1], total[-1]

    @torch.no_grad()
    def _captions(self, before: Image.Image, after: Image.Image, boxes: list[Box]) -> Iterator[str]:
        starts = range(0, len(boxes), BATCH)
        for start in tqdm(starts, desc="sentences", unit="batch", disable=len(boxes) <= BATCH):
            part = boxes[start : start + BATCH]
            ids = torch.tensor([self.processor.encode_prompt()] * len(part), device=self.model.device)
            tokens = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=self._pixels(before, after, part),
                max_new_tokens=64,
                **self.processor.generation_tokens,
            )
            yield from self.processor.post_process_image_text_to_text(tokens[:, ids.shape[1] :])


def _crop(mask: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    return mask[box[1] : box[3], box[0] : box[2]]


def _reflect(image: Image.Image, side: int) -> Image.Image:
    """Fill an image up to side x side px at the right and the bottom, by reflection."""
    if image.size == (side, side):
        return image
    values = np.asarray(image)
    margins = [(0, side - image.height), (0, side - image.width)] + [(0, 0)] * (values.ndim - 2)
    return Image.fromarray(np.pad(values, margins, mode="symmetric"))


def mask_picture(mask: NDArray[np.uint8], num_classes: int) -> Image.Image:
    """Class ids (H, W) -> grey values of LEVIR-MCI's masks: 0, 128 road, 255 building (or change)."""
    values = [0, MASK_BUILDING] if num_classes == 2 else [0, MASK_ROAD, MASK_BUILDING]
    return Image.fromarray(np.array(values, np.uint8)[mask])
