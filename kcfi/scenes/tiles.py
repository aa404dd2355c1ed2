"""Tiles of a scene -> strips of the mask: the model's scores blended as in `Describer`, a row of tiles in memory.

The weights of `processing.describer_kcfi.blend` are a product of one across and one down a tile. So the tiles of a row
are averaged into one map as wide as the scene, then overlapping rows are averaged: the same numbers, without all of
the scene in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from kcfi.processing import NO_LABEL, Describer
from kcfi.processing.describer_kcfi import taper, tile_starts
from kcfi.processing.places_kcfi import Box
from kcfi.scenes.findings import Grid
from kcfi.scenes.kept import Kept
from kcfi.scenes.reading import Layer

Strip = dict[
    str, NDArray[np.uint8]
]  # "mask": class ids, 255 = not seen; "probability": of change in percent, likewise


def strip_bounds(height: int, tile: int) -> list[tuple[int, int]]:
    """First and last (excluded) line of every strip: what is final once its row of tiles is there."""
    return list(pairwise([*tile_starts(height, tile), height]))


def blend_row(maps: Iterable[torch.Tensor], lefts: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Average the maps (C, h, w) of tiles of a row into one of `shape` (C, h, W), each weighted by `taper`.

    Where there is no tile it is 0.
    """
    total, weights = torch.zeros(*shape), torch.zeros(shape[2])
    for values, left in zip(maps, lefts, strict=True):
        weight = taper(values.shape[2])
        total[..., left : left + len(weight)] += values * weight
        weights[left : left + len(weight)] += weight
    return total.div_(weights.clamp(min=torch.finfo(torch.float32).tiny))


def blend_rows(row: Callable[[int], torch.Tensor], height: int, tile: int, first: int = 0) -> Iterator[torch.Tensor]:
    """Average overlapping rows, strip by strip.

    Args:
        row: number of a row of tiles -> its map (C, h, W), which is overwritten.
        height: of the scene in px.
        tile: side of a tile in px.
        first: number of the strip to begin with; rows above it that reach into it are asked for again.

    Yields:
        (C, lines, W) for each strip from `first` on: what it would be with `first=0`, bit by bit.
    """
    tops, bounds = tile_starts(height, tile), strip_bounds(height, tile)
    total, weights, above = torch.zeros(0), torch.zeros(0), bounds[first][0] if first < len(bounds) else height
    for number, top in enumerate(tops):
        if min(top + tile, height) <= above:
            continue
        values = row(number)
        weight = taper(values.shape[1])
        values = values.mul_(weight[:, None])[:, max(0, above - top) :]
        weight = weight[max(0, above - top) :]
        if len(weights):  # of the rows above
            values[:, : len(weights)] += total
            weight[: len(weights)] += weights
        total, weights = values, weight
        if number >= first:
            lines = bounds[number][1] - bounds[number][0]
            yield total[:, :lines] / weights[:lines, None]
            total, weights, above = total[:, lines:], weights[lines:], bounds[number][1]


def detect(describer: Describer, before: Layer, after: Layer, grid: Grid, kept: Kept) -> Iterator[Strip]:
    """The mask of a pair of dates, strip by strip from the top; strips that are kept are not computed again.

    Pixels that one of the dates has no data for are black on both, so that they are no change, and 255 in the results.
    """
    tile, tops = describer.view, tile_starts(grid.height, describer.view)
    bounds = strip_bounds(grid.height, tile)
    done = kept.count()
    for number in range(done):
        yield kept.get(number)

    def row(number: int) -> torch.Tensor:
        return _row_of_tiles(
            describer, before, after, (tops[number], min(tops[number] + tile, grid.height)), grid.width
        )

    strips = blend_rows(row, grid.height, tile, done)
    progress = tqdm(strips, "rows of tiles", total=len(bounds), initial=done, unit="row", disable=len(bounds) < 2)
    for number, scores in enumerate(progress, start=done):
        top, bottom = bounds[number]
        seen = read_both(before, after, (0, top, grid.width, bottom))[2]
        mask = scores.numpy().argmax(0).astype(np.uint8)  # torch takes seven times as long
        changed = 100 * (1 - describer.calibration.class_probabilities(scores)[0])
        probability = changed.round().to(torch.uint8).numpy()
        strip = {"mask": np.where(seen, mask, NO_LABEL), "probability": np.where(seen, probability, NO_LABEL)}
        kept.put(number, strip)
        yield strip


def _row_of_tiles(
    describer: Describer, before: Layer, after: Layer, lines: tuple[int, int], width: int
) -> torch.Tensor:
    """Mask logits (classes, h, W) of a row of tiles between two lines; tiles without data are left out."""
    first, second, seen = read_both(before, after, (0, lines[0], width, lines[1]))
    tile, size = describer.view, describer.batch_size
    lefts = [left for left in tile_starts(width, tile) if seen[:, left : left + tile].any()]
    parts = [(_image(first[:, left : left + tile]), _image(second[:, left : left + tile])) for left in lefts]
    batches = (parts[start : start + size] for start in range(0, len(parts), size))
    maps = (values[1:] for batch in batches for values in describer.tile_maps(batch))
    return blend_row(maps, lefts, (describer.model.config.num_change_classes, *seen.shape))


def read_both(before: Layer, after: Layer, box: Box) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]:
    """A window of both dates (h, w, 3), black on both where one has no data, and where both have it (h, w)."""
    (first, there), (second, too) = before.read(box), after.read(box)
    seen = there & too
    for image in (first, second):
        image[~seen] = 0
    return first, second, seen


def _image(part: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(part))
