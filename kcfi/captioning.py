"""Caption and mask pairs of any size: the work of `kcfi caption`.

Images up to the tile, the side that the model reads, are encoded in one pass. Larger ones are never squeezed, because
a model knows objects at the ground sampling distance it was trained at: they are cut into overlapping tiles, the
tiles' scores are blended, and the sentence is that of the tile which changed most (or there is one for every changed
region).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from scipy import ndimage
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, CompileConfig

from kcfi.pictures import heat_map, overlay
from kcfi.processing import InputError
from kcfi.processing.image_processing_kcfi import read_image
from kcfi.training.arguments import model_source
from kcfi.training.levir_cc import MASK_BUILDING, MASK_ROAD

OVERLAP = 0.25  # of a tile's side, at least, with each neighbour
MERGE = 8  # px: gaps of up to twice this do not part a region
MIN_REGION = 100  # px: smaller regions get no sentence (25 m2 at 0.5 m/px)
LONGEST = 64  # tokens of a sentence; LEVIR-CC has at most 39 words
ENCODED_BY_CPU = 2  # pairs at a time: the best number or close to it, and eight are slower (docs/lab_log.md)

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
Pair = tuple[Image.Image, Image.Image]  # before and after, of one size


@dataclass
class Region:
    """A changed region: its box in pixels (left, top, right, bottom), its changed pixels, its sentence."""

    box: Box
    pixels: int
    caption: str = ""


@dataclass
class ChangeReport:
    """What `Describer.describe` finds in a pair of H x W images.

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


def load(name: str, bf16: bool = False) -> tuple[Any, Any]:
    """Model (in evaluation mode, on the GPU if there is one) and processor of a folder, Hub id or "kcfi-tiny".

    Args:
        name: of the model.
        bf16: in bf16; otherwise as it was saved on a GPU, and in fp32 on a CPU.

    Raises:
        InputError: it cannot be loaded, or is no KCFI model; says why.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if bf16 else "auto" if device.type == "cuda" else torch.float32
    source = model_source(name)
    try:
        kind = AutoConfig.from_pretrained(source).model_type
        if kind != "kcfi":
            raise InputError(f"it is a model of type {kind!r}, not 'kcfi'.")
        model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"Cannot load the model {name!r}: {str(error).splitlines()[0]}") from error
    return model.to(device).eval(), processor


def read_pair(before: str | Path | Image.Image, after: str | Path | Image.Image) -> Pair:
    """Open both dates as the model sees them: upright, 8-bit RGB.

    Args:
        before: path or PIL image, of the kinds that `KCFIImageProcessor` takes.
        after: the same.

    Raises:
        FileNotFoundError: no such file.
        InputError: not an image, more than 8 bits, or the sizes differ; names the files.
    """
    first, second = (read_image(source) for source in (before, after))
    if first.size != second.size:
        names = [f"{source} is " if isinstance(source, str | Path) else "" for source in (before, after)]
        raise InputError(
            f"The images differ in size: {names[0]}{first.width} x {first.height} px, "
            f"{names[1]}{second.width} x {second.height} px. They must show one place, pixel by pixel: crop or "
            "resample one of them."
        )
    return first, second


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that cover `length` px evenly, overlapping by at least `OVERLAP`; [0] if one is enough."""
    count = 1 + max(0, int(np.ceil((length - tile) / (tile * (1 - OVERLAP)))))
    return [int(start) for start in np.linspace(0, max(0, length - tile), count).round()]


def tile_boxes(width: int, height: int, tile: int) -> list[Box]:
    """Boxes, row by row, that cover an image; where the image is narrower than a tile, so are they."""
    return [
        (left, top, min(left + tile, width), min(top + tile, height))
        for top in tile_starts(height, tile)
        for left in tile_starts(width, tile)
    ]


def taper(length: int) -> torch.Tensor:
    """Weights (length,) across a tile: 1 in the middle, falling over `OVERLAP` towards both ends, never 0."""
    nearest_end = torch.minimum(torch.arange(length), torch.arange(length).flip(0)) + 0.5
    return (nearest_end / (length * OVERLAP)).clamp(max=1)


def blend(maps: Iterable[torch.Tensor], boxes: Sequence[Box], shape: Sequence[int]) -> torch.Tensor:
    """Average the maps (C, h, w) of overlapping boxes into one of `shape` (C, H, W), each weighted by `taper`."""
    total, weights = torch.zeros(*shape), torch.zeros(*shape[1:])
    for values, (left, top, right, bottom) in zip(maps, boxes, strict=True):
        weight = taper(bottom - top)[:, None] * taper(right - left)
        total[:, top:bottom, left:right] += values * weight
        weights[top:bottom, left:right] += weight
    return total / weights


def changed_regions(mask: NDArray[np.uint8]) -> list[Region]:
    """Connected changed regions of a mask (H, W), largest first; see `MERGE` and `MIN_REGION`."""
    changed = mask > 0
    labels, _ = ndimage.label(ndimage.maximum_filter(changed, 2 * MERGE + 1, mode="constant"))
    labels[~changed] = 0
    regions = []
    for index, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        pixels = int((labels[rows, columns] == index).sum())
        if pixels >= MIN_REGION:
            regions.append(Region((columns.start, rows.start, columns.stop, rows.stop), pixels))
    return sorted(regions, key=lambda region: -region.pixels)


class Describer:
    """Describes pairs with one model; `describe` and `describe_pairs` are the entry points.

    Args:
        model: KCFIForConditionalGeneration.
        processor: its KCFIProcessor.
        tile: side in pixels of the squares that larger images are cut into; each is resized to the model's input
            size, which is the default. The size of the training images where the model resizes them.
        batch_size: tiles, or pairs that fit into one, that the model takes at a time; a CPU encodes fewer.
        compile: let `torch.compile` translate the steps that write a sentence, with a cache of fixed size. The
            sentences stay the same; each number of pairs at a time costs a translation.

    Raises:
        InputError: a tile smaller than a patch of the vision tower, or an empty batch.
    """

    def __init__(
        self, model: Any, processor: Any, tile: int | None = None, batch_size: int = 8, compile: bool = False
    ) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.tile = model.config.image_size if tile is None else tile
        patch = model.config.patch_size
        if self.tile < patch:
            raise InputError(f"A tile of {self.tile} px is smaller than a patch of the vision tower, {patch} px.")
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} must be at least 1.")
        self.generation: dict[str, Any] = {}  # further arguments of `generate`
        if compile:
            settings = CompileConfig()
            settings._compile_all_devices = True  # type: ignore[assignment]  # else `generate` does it on a GPU alone
            self.generation = {"cache_implementation": "static", "compile_config": settings}

    def describe(
        self, before: str | Path | Image.Image, after: str | Path | Image.Image, regions: bool = False
    ) -> ChangeReport:
        """Caption and mask a pair.

        Args:
            before: path or PIL image of any size.
            after: of the same size.
            regions: also write a sentence for every changed region; needs a change detection head.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a pair that `read_pair` refuses, or regions without a head.
        """
        [report] = self.describe_pairs([read_pair(before, after)], regions)
        return report

    @torch.no_grad()
    def describe_pairs(self, pairs: Sequence[Pair], regions: bool = False) -> list[ChangeReport]:
        """Caption and mask pairs; those that fit into a tile are encoded once and in batches.

        Args:
            pairs: of `read_pair`.
            regions: also write a sentence for every changed region; needs a change detection head.

        Raises:
            ValueError: regions without a head.
        """
        if regions and self.model.model.change_detection_head is None:
            raise InputError("This model has no change detection head: it cannot find regions.")
        reports = self._describe_small([pair for pair in pairs if self.fits(pair[0])], regions)
        return [next(reports) if self.fits(pair[0]) else self._describe_large(*pair, regions) for pair in pairs]

    def fits(self, image: Image.Image) -> bool:
        """Whether an image is encoded in one pass, resized to the model's input."""
        return max(image.size) <= self.tile

    def _describe_small(self, pairs: Sequence[Pair], regions: bool) -> Iterator[ChangeReport]:
        """Pairs that fit into a tile: encoded once, for the masks and for the sentences."""
        for first in range(0, len(pairs), self.batch_size):
            batch = pairs[first : first + self.batch_size]
            features = self._encode(batch)
            sizes = [(before.height, before.width) for before, _ in batch]
            for maps, sentence in zip(self._maps(features, sizes), self._sentences(features), strict=True):
                report = _without_sentences(maps, regions)
                report.caption = sentence
                for region in report.regions:  # what is around it is the whole image
                    region.caption = sentence
                yield report

    def _describe_large(self, before: Image.Image, after: Image.Image, regions: bool) -> ChangeReport:
        """A pair that is cut into tiles: detected first, then described where it changed."""
        width, height = before.size
        boxes = tile_boxes(width, height, self.tile)
        head = self.model.model.change_detection_head
        channels = 1 if head is None else 1 + self.model.config.num_change_classes
        maps = self._tile_maps(before, after, boxes)
        report = _without_sentences(blend(maps, boxes, (channels, height, width)), regions)

        changed = report.mask is not None and bool(report.mask.any())
        evidence = np.asarray(report.mask) > 0 if changed else report.key_changes
        most_changed = max(boxes, key=lambda box: evidence[box[1] : box[3], box[0] : box[2]].sum())
        windows = [most_changed, *(self._window(region.box, width, height) for region in report.regions)]
        batches = self._tiles(before, after, windows, "sentences")
        report.caption, *sentences = (text for _, features in batches for text in self._sentences(features))
        for region, sentence in zip(report.regions, sentences, strict=True):
            region.caption = sentence
        return report

    def _window(self, box: Box, width: int, height: int) -> Box:
        """The tile around the middle of a region, inside the image."""
        left = int(np.clip((box[0] + box[2] - self.tile) // 2, 0, max(0, width - self.tile)))
        top = int(np.clip((box[1] + box[3] - self.tile) // 2, 0, max(0, height - self.tile)))
        return left, top, min(left + self.tile, width), min(top + self.tile, height)

    def _view(self, image: Image.Image, box: Box) -> Image.Image:
        """A box of a large image; where the image is narrower than the tile, its reflection fills the tile."""
        view = image.crop(box)
        if view.size == (self.tile, self.tile):
            return view
        margins = [(0, self.tile - view.height), (0, self.tile - view.width), (0, 0)]
        return Image.fromarray(np.pad(np.asarray(view), margins, mode="symmetric"))

    def _tiles(
        self, before: Image.Image, after: Image.Image, boxes: Sequence[Box], what: str
    ) -> Iterator[tuple[Sequence[Box], Any]]:
        """Boxes of a large image, some at a time, and what the model sees in them."""
        size = self.batch_size
        for first in tqdm(range(0, len(boxes), size), what, unit="batch", disable=len(boxes) <= size, leave=False):
            batch = boxes[first : first + size]
            yield batch, self._encode([(self._view(before, box), self._view(after, box)) for box in batch])

    def _tile_maps(self, before: Image.Image, after: Image.Image, boxes: Sequence[Box]) -> Iterator[torch.Tensor]:
        """`_maps` of every box of a large image, cut to the box where it is narrower than the tile."""
        for batch, features in self._tiles(before, after, boxes, "tiles"):
            maps = self._maps(features, [(self.tile, self.tile)] * len(batch))
            for values, (left, top, right, bottom) in zip(maps, batch, strict=True):
                yield values[:, : bottom - top, : right - left]

    def _encode(self, pairs: Sequence[Pair]) -> Any:
        """The output of `get_image_features` for pairs of at most a tile, without the vision tower's own states."""
        side = self.model.config.image_size
        inputs = self.processor.image_processor(
            [list(pair) for pair in pairs],
            size={"height": side, "width": side},
            do_resize=True,
            do_center_crop=False,
            return_tensors="pt",
        )
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        at_once = ENCODED_BY_CPU if pixels.device.type == "cpu" else len(pixels)
        parts = [self.model.get_image_features(pixel_values=part) for part in pixels.split(at_once)]
        return type(parts[0])(
            pooler_output=[features for part in parts for features in part.pooler_output],
            change_features=torch.cat([part.change_features for part in parts]),
            mask_logits=None if parts[0].mask_logits is None else torch.cat([part.mask_logits for part in parts]),
        )

    def _maps(self, features: Any, sizes: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """Per pair (1 + classes, *size): norm of the key change features, and the mask logits if there is a head."""
        config = self.model.config
        grid = (config.image_size // config.patch_size,) * 2
        norms = features.change_features[..., : config.stage_width].float().norm(dim=-1)  # (B,N), no context
        maps = [norms[:, None].unflatten(2, grid)]
        if features.mask_logits is not None:
            maps.append(features.mask_logits.float())
        for index, size in enumerate(sizes):
            views = [F.interpolate(scores[index, None], size=size, mode="bilinear")[0] for scores in maps]
            yield torch.cat(views).cpu()

    def _sentences(self, features: Any) -> list[str]:
        """A sentence for each pair that was encoded."""
        prompt = torch.tensor([self.processor.encode_prompt()], device=self.model.device)
        input_ids = prompt.expand(len(features.pooler_output), -1)
        tokens = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            mm_encoder_outputs={"image": features},
            max_new_tokens=LONGEST,
            do_sample=False,
            **self.processor.generation_tokens,
            **self.generation,
        )
        texts = self.processor.post_process_image_text_to_text(tokens[:, input_ids.shape[1] :])
        return [text.rstrip() for text in texts]


def _without_sentences(maps: torch.Tensor, regions: bool) -> ChangeReport:
    """Maps (1 or 1 + classes, H, W) of `Describer._maps` -> a report that lacks its sentences yet."""
    mask = maps[1:].argmax(0).to(torch.uint8).numpy() if len(maps) > 1 else None
    changed = None if mask is None else float((mask > 0).mean())
    found = changed_regions(mask) if regions and mask is not None else []
    return ChangeReport("", mask, changed, maps[0].numpy(), found)


def mask_picture(mask: NDArray[np.uint8], num_classes: int) -> Image.Image:
    """Class ids (H, W) -> grey values of LEVIR-MCI's masks: 0, 128 road, 255 building (or change)."""
    values = [0, MASK_BUILDING] if num_classes == 2 else [0, MASK_ROAD, MASK_BUILDING]
    return Image.fromarray(np.array(values, np.uint8)[mask])


def save_pictures(
    report: ChangeReport, after: Image.Image, output: Path, name: str, num_classes: int, heatmap: bool = False
) -> dict[str, str]:
    """Write what there is to see of a pair as OUTPUT/NAME_mask.png, NAME_overlay.png and NAME_heatmap.png.

    Args:
        report: of the pair.
        after: its later image.
        output: folder, which exists.
        name: of the pair.
        num_classes: of the model's mask.
        heatmap: also draw the strength of the key change features.

    Returns:
        The paths, by kind; no mask and no overlay without a change detection head.
    """
    pictures = {}
    if report.mask is not None:
        pictures["mask"] = mask_picture(report.mask, num_classes)
        pictures["overlay"] = overlay(after, report.mask)
    if heatmap:
        pictures["heatmap"] = heat_map(after, report.key_changes)
    paths = {kind: output / f"{name}_{kind}.png" for kind in pictures}
    for kind, picture in pictures.items():
        picture.save(paths[kind])
    return {kind: str(path) for kind, path in paths.items()}
