"""Describer: pairs of any size -> masks and sentences, for `kcfi caption`, `kcfi evaluate` and the pipeline alike.

A pair as large as the images that the model was trained on (`KCFIProcessor.tile_size`) goes through the processor, as
in training. Larger ones are never squeezed, because a model knows objects at the ground sampling distance it was
trained at: they are cut into overlapping tiles, the tiles' scores are blended, and the sentence is that of the tile
which changed most (or there is one for every changed region).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from .calibration_kcfi import Calibration
from .image_processing_kcfi import NO_LABEL
from .places_kcfi import IMAGE, Box, Places, center_of, place_in_image, tells_of_change
from .processing_kcfi import INSTRUCTIONS, KCFIProcessor
from .reading_kcfi import InputError, read_pair

try:
    from scipy import ndimage
except ImportError:  # only regions need it
    ndimage = None

OVERLAP = 0.25  # of a tile's side, at least, with each neighbour
MERGE = 8  # px: gaps of up to twice this do not part a region
MIN_REGION = 100  # px: smaller regions get no sentence (25 m2 at 0.5 m/px)
LONGEST = 64  # tokens of a sentence; LEVIR-CC has at most 39 words
ENCODED_BY_CPU = 2  # pairs at a time: the best number or close to it, and eight are slower (docs/lab_log.md)
UNCHANGED = "the scene is the same as before ."
BEAMS = 5  # sentences among which one that tells of a change is looked for, where the mask marks one

Pair = tuple[Image.Image, Image.Image]  # before and after, of one size


@dataclass
class Region:
    """A changed region.

    Args:
        box: in pixels (left, top, right, bottom).
        pixels: how many of them changed.
        caption: its sentence; the places that it names are places in the whole image.
        score: of the sentence, as in `ChangeReport`.
        probability: mean probability of change of its pixels, 0 to 1.
    """

    box: Box
    pixels: int
    caption: str = ""
    score: float | None = None
    probability: float | None = None


@dataclass
class ChangeReport:
    """What a `Describer` finds in a pair of H x W images.

    Args:
        caption: the sentence for the pair.
        caption_box: the part of the images (left, top, right, bottom in pixels) that the sentence describes: all of
            them, or the tile that changed most. The places that it names are places in the whole images.
        score: geometric mean of the probabilities of the sentence's tokens, 0 to 1; None for a sentence that the model
            did not write (see `Describer`).
        mask: (H, W) uint8 class ids, 0 = no change, 255 = not seen by the model (the border that its centre crop
            leaves); None without a change detection head.
        changed_fraction: share of the pixels seen that changed, 0 to 1; None without a head.
        changed_probability: that anything changed, 0 to 1 (of images that are cut into tiles: in the surest one); None
            without a head. See `Calibration`.
        probabilities: (H, W) probability of change, whatever the class; None without a head.
        classes: (H, W) uint8, the likeliest class of change of every pixel, from 1, whether it changed or not: what a
            mask of another threshold on the probabilities holds; None without a head.
        key_changes: (H, W) norm of the key change features (the paper's Fig. 1), in the model's own units.
        regions: changed regions, largest first; empty unless they were asked for.
    """

    caption: str
    caption_box: Box
    score: float | None
    mask: NDArray[np.uint8] | None
    changed_fraction: float | None
    changed_probability: float | None
    probabilities: NDArray[np.float32] | None
    classes: NDArray[np.uint8] | None
    key_changes: NDArray[np.float32]
    regions: list[Region] = field(default_factory=list)


class Told(NamedTuple):
    """What gets a sentence: the part of the image that the model looks at, and what changed there."""

    report: ChangeReport | Region
    box: Box
    pixels: NDArray[np.bool_]  # of the box
    view: torch.Tensor  # the same as the model sees it, bool (h, w)
    label: int  # class of most of the pixels, 0 where there are none


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))


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


def changed_pixels(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where a mask of class ids marks a change."""
    return (mask > 0) & (mask != NO_LABEL)


def changed_regions(mask: NDArray[np.uint8]) -> list[tuple[Region, NDArray[np.bool_]]]:
    """Connected changed regions of a mask (H, W), largest first, each with its pixels in a map of its box.

    See `MERGE` and `MIN_REGION`.

    Raises:
        InputError: scipy is not installed.
    """
    if ndimage is None:
        raise InputError("Changed regions need scipy: `pip install scipy`.")
    changed = changed_pixels(mask)
    labels, _ = ndimage.label(ndimage.maximum_filter(changed, 2 * MERGE + 1, mode="constant"))
    labels[~changed] = 0
    regions = []
    for index, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        area = labels[rows, columns] == index
        if area.sum() >= MIN_REGION:
            regions.append((Region((columns.start, rows.start, columns.stop, rows.stop), int(area.sum())), area))
    return sorted(regions, key=lambda region: -region[0].pixels)


def seen_from(box: Box, part: Box, area: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """An area, given in a map of `part`, in a map of `box`; both are boxes in pixels of one image."""
    left, top, right, bottom = box
    seen = np.zeros((bottom - top, right - left), bool)
    x0, y0, x1, y1 = max(left, part[0]), max(top, part[1]), min(right, part[2]), min(bottom, part[3])
    if x0 < x1 and y0 < y1:
        seen[y0 - top : y1 - top, x0 - left : x1 - left] = area[
            y0 - part[1] : y1 - part[1], x0 - part[0] : x1 - part[0]
        ]
    return seen


def check_finite(values: torch.Tensor, what: str) -> None:
    """Refuse to make a sentence or a mask of NaN or Inf.

    Args:
        values: (B, ...).
        what: "caption" or "mask".

    Raises:
        FloatingPointError: names the rows by their numbers, from 1.
    """
    finite = torch.isfinite(values).flatten(1).all(dim=1) if values.dim() > 1 else torch.isfinite(values)
    if not finite.all():
        numbers = ", ".join(str(number + 1) for number in (~finite).nonzero().flatten().tolist())
        raise FloatingPointError(
            f"The {what} logits are not finite (number {numbers} of {len(values)}): the weights are broken, or too "
            "large for their precision."
        )


def write_captions(
    model: Any, processor: KCFIProcessor, features: Any, prompt_ids: torch.Tensor, **generation: Any
) -> tuple[list[str], list[float]]:
    """Sentences for pairs that are encoded: greedily, unless `generation` says otherwise.

    Args:
        model: KCFIForConditionalGeneration.
        processor: its processor.
        features: of `get_image_features`, for B pairs.
        prompt_ids: (B, T) prompts of one length.
        **generation: further arguments of `generate()`.

    Returns:
        B sentences (with `num_return_sequences`: so many times B) and their scores, see `ChangeReport`.

    Raises:
        FloatingPointError: logits of a sentence are not finite; it would be made up of them.
    """
    plain: dict[str, Any] = {"max_new_tokens": LONGEST, "do_sample": False, "num_beams": 1}
    plain["repetition_penalty"] = 1.0  # instruct models ship another one, made for long answers
    settings = {**plain, **processor.generation_tokens, **generation}
    output = model.generate(
        input_ids=prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        mm_encoder_outputs={"image": features},
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    beams = output.get("beam_indices")
    log_probabilities = model.compute_transition_scores(output.sequences, output.scores, beams, normalize_logits=True)
    tokens = output.sequences[:, prompt_ids.shape[1] :]
    ends = torch.isin(tokens, torch.tensor(settings["eos_token_id"], device=tokens.device)).int()
    written = ends.cumsum(dim=1) - ends == 0  # up to and with the first end token; padding follows
    scores = (log_probabilities.masked_fill(~written, 0).sum(dim=1) / written.sum(dim=1)).exp()
    check_finite(scores, "caption")
    return [text.rstrip() for text in processor.post_process_image_text_to_text(tokens)], scores.tolist()


class Describer:
    """Describes pairs with one model; `describe` and `describe_pairs` are the entry points.

    Sentences and masks must not contradict each other: where a region, or the tile of a large image that the sentence
    describes, is marked as changed but the sentence says that nothing is, the likeliest of `BEAMS` other sentences
    that tells of a change takes its place, and where none does, the plain statement of class and place ("a building
    has changed in the top left corner ."). The sentence of a pair that fits into one tile stays as the model wrote
    it: that is what is scored. With an `alarm_rate` its changed probability decides: up to the threshold the pair
    counts as unchanged, the mask is empty and the sentence says so; above it the sentence tells of a change.

    Args:
        model: KCFIForConditionalGeneration, in evaluation mode.
        processor: its KCFIProcessor.
        tile: side in pixels of the images that the model was trained on. Up to it a pair is read at once; larger ones
            are cut into squares of it, each resized as in training. None = `processor.tile_size`, or else the size to
            which the processor resizes.
        batch_size: tiles, or pairs that fit into one, that the model takes at a time; a CPU encodes fewer.
        instruction: the question put to the model.
        autocast: type that torch computes in beside weights of another (None: that of the weights).
        alarm_rate: call at most this share of unchanged pairs (or tiles) changed, see `Calibration.threshold`; None =
            go by the likeliest class and sentence.
        **generation: further arguments of `generate()`, for one sentence per pair.

    Attributes:
        expect: called with a number of pairs or tiles before so many are described, by whoever knows it: what makes
            them faster, and takes a while to start, starts then (`kcfi.speed`).
        encode: the tower in place of `KCFIModel.encode_dates`, with equal stages of both dates; None = that.

    Raises:
        InputError: a tile smaller than a patch of the vision tower, an empty batch, several sentences asked for, or an
            alarm rate for which the processor's calibration has too few pairs, or the model no head.
    """

    def __init__(
        self,
        model: Any,
        processor: KCFIProcessor,
        tile: int | None = None,
        batch_size: int = 8,
        instruction: str = INSTRUCTIONS[0],
        autocast: torch.dtype | None = None,
        alarm_rate: float | None = None,
        **generation: Any,
    ) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.instruction, self.autocast, self.generation = instruction, autocast, generation
        self.expect: Callable[[int], None] = lambda pairs: None
        self.encode: Callable[..., Any] | None = None
        self.calibration = Calibration(**(processor.calibration or {}))
        self.threshold = None if alarm_rate is None else self.calibration.threshold(alarm_rate)
        if alarm_rate is not None and model.model.change_detection_head is None:
            raise InputError("This model has no change detection head: it cannot keep an alarm rate.")
        images, side = processor.image_processor, model.config.image_size
        resized = images.size.get("shortest_edge") or images.size["height"]
        self.tile = tile or processor.tile_size or resized
        patch = model.config.patch_size
        if self.tile < patch:
            raise InputError(f"A tile of {self.tile} px is smaller than a patch of the vision tower, {patch} px.")
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} must be at least 1.")
        if generation.get("num_return_sequences", 1) != 1:
            raise InputError(f"num_return_sequences={generation['num_return_sequences']}: a pair gets one sentence.")
        # what the model sees of a training image: a centre crop leaves a border
        self.view = max(1, round(self.tile * side / resized)) if images.do_center_crop else self.tile

    def describe(self, before: Any, after: Any, regions: bool = False, **reading: Any) -> ChangeReport:
        """Caption and mask a pair.

        Args:
            before: path, PIL image, array or tensor, of any size.
            after: of the same size.
            regions: also write a sentence for every changed region; needs a change detection head.
            **reading: settings of `read_pair` (`bands`, `stretch`, `max_image_pixels`).

        Raises:
            FileNotFoundError: no such file.
            InputError: a pair that `read_pair` refuses, or regions without a head.
        """
        [report] = self.describe_pairs([read_pair(before, after, **self.reading(**reading))], regions)
        return report

    def reading(self, **given: Any) -> dict[str, Any]:
        """Settings of `read_pair`: those saved with the image processor, with `given` in their place."""
        return self.processor.image_processor.reading(**given)

    def describe_pairs(self, pairs: Sequence[Pair], regions: bool = False) -> list[ChangeReport]:
        """Caption and mask pairs; those that fit into a tile are encoded once and in batches.

        Args:
            pairs: of `read_pair`.
            regions: also write a sentence for every changed region; needs a change detection head.

        Raises:
            InputError: regions without a head.
        """
        if regions:
            self.check_regions()
        with self._inference():
            reports = self._describe_small([pair for pair in pairs if self.fits(pair[0])], regions)
            return [next(reports) if self.fits(pair[0]) else self._describe_large(*pair, regions) for pair in pairs]

    def check_regions(self) -> None:
        """Refuse a model that cannot find regions.

        Raises:
            InputError: it has no change detection head.
        """
        if self.model.model.change_detection_head is None:
            raise InputError("This model has no change detection head: it cannot find regions.")

    @contextmanager
    def _inference(self) -> Iterator[None]:
        kind = self.model.device.type
        with torch.no_grad(), torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
            yield

    def fits(self, image: Image.Image) -> bool:
        """Whether an image is read at once, as in training."""
        return max(image.size) <= self.tile

    def mask_logits(self, pairs: Sequence[Pair]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Mask logits (classes, H, W) of pairs that fit into a tile, and where the model saw them, bool (H, W)."""
        sizes = [(before.height, before.width) for before, _ in pairs]
        with self._inference():
            maps = self._maps(self._compare(*self._stages(pairs, as_trained=True)))
        resized = self.processor.image_processor.post_process_maps(maps, sizes)
        return [(values[1:], seen) for values, seen in resized]

    def _describe_small(self, pairs: Sequence[Pair], regions: bool) -> Iterator[ChangeReport]:
        """Pairs that fit into a tile: encoded once, for the masks and for all sentences."""
        for batch in _chunks(pairs, self.batch_size):
            sizes = [(before.height, before.width) for before, _ in batch]
            stages = self._stages(batch, as_trained=True)
            features = self._compare(*stages)
            sentences, scores = self._write(features)
            maps = self.processor.image_processor.post_process_maps(self._maps(features), sizes)
            for index, (values, seen) in enumerate(maps):
                report, found = self._report(values, seen, [(0, 0, *sizes[index][::-1])], regions)
                report.caption, report.score = sentences[index], scores[index]
                to_view = self.processor.image_processor.to_view
                told = []
                if self.threshold is not None and self._called_changed(report) != tells_of_change(report.caption):
                    report.caption, report.score = UNCHANGED, None
                    if self._called_changed(report):
                        whole = to_view(torch.ones(sizes[index], dtype=torch.bool))
                        pixels = _likeliest(report)
                        label = _label(report.mask, report.caption_box, pixels)
                        told.append(Told(report, report.caption_box, pixels, whole, label))
                for region, area in found:
                    pixels = seen_from(report.caption_box, region.box, area)
                    view, label = to_view(torch.from_numpy(pixels)), _label(report.mask, report.caption_box, pixels)
                    told.append(Told(region, report.caption_box, pixels, view, label))
                for some in _chunks(told, self.batch_size):
                    one = [[stage[index].expand(len(some), -1, -1, -1) for stage in date] for date in stages]
                    self._tell(some, one, batch[index][0].size)
                yield report

    def _called_changed(self, report: ChangeReport) -> bool:
        """Whether the probability of a pair, read at once, is above the threshold of the alarm rate."""
        return report.changed_probability > self.threshold  # type: ignore[operator]  # both are there

    def _describe_large(self, before: Image.Image, after: Image.Image, regions: bool) -> ChangeReport:
        """A pair that is cut into tiles: detected first, then described where it changed."""
        width, height = before.size
        boxes = tile_boxes(width, height, self.view)
        self.expect(len(boxes))
        head = self.model.model.change_detection_head
        channels = 1 if head is None else 1 + self.model.config.num_change_classes
        values = blend(self._tile_maps(before, after, boxes), boxes, (channels, height, width))
        report, found = self._report(values, torch.ones(height, width, dtype=torch.bool), boxes, regions)
        changed = np.zeros((height, width), bool) if report.mask is None else changed_pixels(report.mask)
        evidence = changed if changed.any() else report.key_changes
        report.caption_box = max(boxes, key=lambda box: evidence[box[1] : box[3], box[0] : box[2]].sum())
        pixels = seen_from(report.caption_box, (0, 0, width, height), changed)
        whole = torch.ones(self.view, self.view, dtype=torch.bool)
        label = _label(report.mask, report.caption_box, pixels)
        told = [Told(report, report.caption_box, pixels, whole, label)]
        for region, area in found:
            box = self.window(region.box, width, height)
            pixels = seen_from(box, region.box, area)
            told.append(self.told(region, box, pixels, _label(report.mask, box, pixels)))
        if self.threshold is not None and not changed.any():
            told, report.caption = told[1:], UNCHANGED
        for some in _chunks(told, self.batch_size):
            self.tell(some, [(before.crop(each.box), after.crop(each.box)) for each in some], before.size)
        return report

    def told(self, region: Region, box: Box, pixels: NDArray[np.bool_], label: int) -> Told:
        """What `tell` takes of a region: it is told of inside `box` (`window`), by its pixels in that box alone."""
        view = torch.zeros(self.view, self.view, dtype=torch.bool)
        view[: pixels.shape[0], : pixels.shape[1]] = torch.from_numpy(pixels)
        return Told(region, box, pixels, view, label)

    def tell(self, told: Sequence[Told], parts: Sequence[Pair], size: tuple[int, int], places: Places = IMAGE) -> None:
        """Write the sentences of regions of a large image into their reports, as one batch.

        Args:
            told: of `told`.
            parts: of both dates, their boxes.
            size: width and height of the image.
            places: the words for places in it.
        """
        with self._inference():
            self._tell(told, self._stages([self._fill(part) for part in parts]), size, places)

    def _tell(self, told: Sequence[Told], stages: Any, size: tuple[int, int], places: Places = IMAGE) -> None:
        """`tell`, from the stage features of the views on."""
        features = self._compare(*self._only(stages, torch.stack([each.view for each in told])))
        for index, (each, sentence, score) in enumerate(zip(told, *self._write(features), strict=True)):
            chosen: tuple[str, float | None] | None = (sentence, score)
            if each.pixels.sum() >= MIN_REGION and not tells_of_change(sentence):
                one = type(features)(pooler_output=features.pooler_output[index : index + 1])
                others = zip(*self._write(one, num_beams=BEAMS, num_return_sequences=BEAMS), strict=True)
                chosen = next((other for other in others if tells_of_change(other[0])), None)
            if chosen is None:
                each.report.caption, each.report.score = self._statement(each, size, places), None
            else:
                each.report.caption = place_in_image(chosen[0], each.box, each.pixels, size, places)
                each.report.score = chosen[1]

    def _statement(self, told: Told, size: tuple[int, int], places: Places) -> str:
        """What the mask itself says of its marked pixels."""
        classes = self.model.config.num_change_classes
        name = (("something", "something") if classes == 2 else ("something", "a road", "a building"))[told.label]
        x, y = center_of(told.pixels)
        place = places.phrase((told.box[0] + x) / size[0], (told.box[1] + y) / size[1])
        return f"{name} has changed {place}{places.whole} ."

    def window(self, box: Box, width: int, height: int) -> Box:
        """The tile around the middle of a region, inside the image."""
        left = int(np.clip((box[0] + box[2] - self.view) // 2, 0, max(0, width - self.view)))
        top = int(np.clip((box[1] + box[3] - self.view) // 2, 0, max(0, height - self.view)))
        return left, top, min(left + self.view, width), min(top + self.view, height)

    def _fill(self, pair: Pair) -> Pair:
        """A part of a large pair as the model takes it: a tile, which its reflection fills where it is narrower."""
        width, height = pair[0].size
        if (width, height) == (self.view, self.view):
            return pair
        margins = [(0, self.view - height), (0, self.view - width), (0, 0)]
        before, after = (Image.fromarray(np.pad(np.asarray(image), margins, mode="symmetric")) for image in pair)
        return before, after

    def _tile_maps(self, before: Image.Image, after: Image.Image, boxes: Sequence[Box]) -> Iterator[torch.Tensor]:
        """`tile_maps` of every box of a large pair."""
        size = self.batch_size
        for first in tqdm(range(0, len(boxes), size), "tiles", unit="batch", disable=len(boxes) <= size, leave=False):
            yield from self.tile_maps([(before.crop(box), after.crop(box)) for box in boxes[first : first + size]])

    def tile_maps(self, parts: Sequence[Pair]) -> Iterator[torch.Tensor]:
        """Maps of parts of a large pair, no larger than a tile, as one batch.

        Yields:
            (1 + classes, h, w) per part, on the CPU: norm of the key change features, and the mask logits if there is
            a change detection head.
        """
        with self._inference():
            maps = self._maps(self._compare(*self._stages([self._fill(part) for part in parts])))
            maps = F.interpolate(maps, (self.view, self.view), mode="bilinear")
        for values, (before, _) in zip(maps, parts, strict=True):
            yield values[:, : before.height, : before.width]

    def _stages(self, pairs: Sequence[Pair], as_trained: bool = False) -> tuple[list[Any], list[Any]]:
        """Stage features of pairs: through the processor as in training, or of views that are seen as a whole."""
        side = self.model.config.image_size
        whole = {"size": {"height": side, "width": side}, "do_resize": True, "do_center_crop": False}
        images = [list(pair) for pair in pairs]
        inputs = self.processor.image_processor(images, return_tensors="pt", **({} if as_trained else whole))
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        at_once = ENCODED_BY_CPU if pixels.device.type == "cpu" else len(pixels)
        network = self.model.model
        if self.encode is None:
            parts = [network.get_stage_features(part)[:2] for part in pixels.split(at_once)]
        else:
            parts = [network.project(*self.encode(part)) for part in pixels.split(at_once)]
        before, after = ([torch.cat(maps) for maps in zip(*date, strict=True)] for date in zip(*parts, strict=True))
        return before, after

    def _compare(self, before: list[torch.Tensor], after: list[torch.Tensor]) -> Any:
        """What `get_image_features` gives from the stage features on."""
        side = self.model.config.image_size
        return self.model.model.compare(before, after, (side, side))

    def _only(self, stages: Any, views: torch.Tensor) -> tuple[list[Any], list[Any]]:
        """Stage features of pairs that changed in one area of their views (B, h, w) alone, and around it."""
        before, after = stages
        patches = F.adaptive_max_pool2d(views[:, None].float(), before[0].shape[-2:])
        area = F.max_pool2d(patches, 3, stride=1, padding=1).to(before[0].device) > 0
        return before, [torch.where(area, new, old) for old, new in zip(before, after, strict=True)]

    def _maps(self, features: Any) -> torch.Tensor:
        """(B, 1 + classes, H, W): norm of the key change features, and the mask logits if there is a head."""
        config = self.model.config
        grid, side = (config.image_size // config.patch_size,) * 2, config.image_size
        norms = features.change_features[..., : config.stage_width].float().norm(dim=-1)  # (B,N), no context
        maps = F.interpolate(norms[:, None].unflatten(2, grid), (side, side), mode="bilinear")
        if features.mask_logits is not None:
            check_finite(features.mask_logits, "mask")
            maps = torch.cat([maps, features.mask_logits.float()], 1)
        return maps.cpu()

    def _report(
        self, values: torch.Tensor, seen: torch.Tensor, boxes: Sequence[Box], regions: bool
    ) -> tuple[ChangeReport, list[tuple[Region, NDArray[np.bool_]]]]:
        """Maps (1 or 1 + classes, H, W) of `_maps` -> a report that lacks its sentences yet, and its regions.

        Args:
            values: the maps.
            seen: where the model saw the image, bool (H, W).
            boxes: the tiles of the image; each is called changed or not by itself.
            regions: whether regions are asked for.
        """
        height, width = values.shape[1:]
        box, key_changes = (0, 0, width, height), values[0].numpy()
        report = ChangeReport("", box, None, None, None, None, None, None, key_changes)
        found: list[tuple[Region, NDArray[np.bool_]]] = []
        if len(values) > 1:
            changes = 1 - self.calibration.class_probabilities(values[1:])[0]
            called = torch.zeros_like(seen)
            sure = [self._tile_probability(changes, seen, box) for box in boxes]
            for (left, top, right, bottom), probability in zip(boxes, sure, strict=True):
                called[top:bottom, left:right] |= self.threshold is None or probability > self.threshold
            scores = values[1:].numpy()  # numpy's argmax: torch takes seven times as long
            mask = np.where(seen.numpy(), scores.argmax(0) * called.numpy(), NO_LABEL).astype(np.uint8)
            report.mask, report.probabilities = mask, changes.numpy()
            report.classes = (1 + scores[1:].argmax(0)).astype(np.uint8)
            report.changed_probability = max(sure)
            report.changed_fraction = float(changed_pixels(mask).sum() / seen.sum())
            found = changed_regions(mask) if regions else []
            for region, area in found:
                left, top, right, bottom = region.box
                region.probability = float(report.probabilities[top:bottom, left:right][area].mean())
        report.regions = [region for region, _ in found]
        return report, found

    def _tile_probability(self, changes: torch.Tensor, seen: torch.Tensor, box: Box) -> float:
        """Probability that anything changed in a box of an image."""
        left, top, right, bottom = box
        pixels = changes[top:bottom, left:right][seen[top:bottom, left:right]]
        return self.calibration.pair_probability(pixels) if len(pixels) else 0.0

    def _write(self, features: Any, **generation: Any) -> tuple[list[str], list[float]]:
        """`write_captions` with this describer's instruction and settings."""
        prompt = torch.tensor([self.processor.encode_prompt(self.instruction)], device=self.model.device)
        prompt = prompt.expand(len(features.pooler_output), -1)
        return write_captions(self.model, self.processor, features, prompt, **{**self.generation, **generation})


def _likeliest(report: ChangeReport) -> NDArray[np.bool_]:
    """The marked pixels of a report, (H, W); where they are fewer than `MIN_REGION`, the likeliest so many."""
    assert report.mask is not None and report.probabilities is not None  # there is a head
    pixels = changed_pixels(report.mask)
    if pixels.sum() < MIN_REGION:
        count = min(MIN_REGION, pixels.size)
        pixels = report.probabilities >= np.partition(report.probabilities.ravel(), -count)[-count]
    return pixels


def _label(mask: NDArray[np.uint8] | None, box: Box, pixels: NDArray[np.bool_]) -> int:
    """The class that most of the marked pixels of a box have in a mask; 0 where none is marked."""
    if mask is None or not pixels.any():
        return 0
    left, top, right, bottom = box
    return int(np.bincount(mask[top:bottom, left:right][pixels]).argmax())


__all__ = ["ChangeReport", "Describer", "Region", "Told"]
