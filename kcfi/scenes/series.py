"""More than two dates: what changed for good, and when it was first seen.

Every date is compared with the first, which tells what changed, and with the one before it, on which two a change is
described. Dates are numbered from 0; a number 0 in a raster of dates is "no change", for the first shows none.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rasterio.windows import Window

from kcfi.processing import NO_LABEL, InputError
from kcfi.scenes.findings import Change, Date, Grid
from kcfi.scenes.rasters import BLOCK, NewRaster
from kcfi.scenes.reading import open_raster

Pair = tuple[int, int]  # numbers of an earlier and a later date
FIRST_SEEN = "first_seen.tif"  # number of the date on which a pixel's change is first seen


def pairs(dates: int) -> list[Pair]:
    """Which dates are compared: each with the first, then each with the one before it."""
    return [(0, later) for later in range(1, dates)] + [(later - 1, later) for later in range(2, dates)]


def check_confirm(confirm: int, dates: int) -> None:
    """Refuse a number of confirmations that so many dates cannot give; of two dates none can be asked for.

    Raises:
        InputError: so it is.
    """
    if confirm < 0 or confirm > dates - 2 > 0:
        raise InputError(f"confirm={confirm}: of {dates} dates 0 to {max(0, dates - 2)} can confirm a change.")


def first_seen(marked: NDArray[np.bool_], confirm: int) -> NDArray[np.uint8]:
    """The number of the date on which each pixel's change is first seen; 0 = there is none.

    A date counts if it is marked, and so are at least `confirm` of the later ones; or all, where they are fewer.

    Args:
        marked: (dates - 1, H, W), what the comparison of each date but the first with the first marks.
        confirm: how many.
    """
    first, later = np.zeros(marked.shape[1:], np.uint8), np.zeros(marked.shape[1:], np.uint8)
    for number in range(len(marked), 0, -1):
        needed = min(confirm, len(marked) - number)
        first[marked[number - 1] & (later >= needed)] = number
        later += marked[number - 1]
    return first


def join(folders: Sequence[Path], grid: Grid, confirm: int, work: Path) -> int:
    """The masks of all dates against the first -> one, with the date on which each of its pixels is first seen.

    Where something changed, class and probability are those of this date; elsewhere those of the last date.

    Args:
        folders: of each date but the first: with `mask.tif` and `probability.tif` of its comparison with the first.
        grid: of the scene.
        confirm: see `first_seen`.
        work: folder for `mask.tif`, `probability.tif` and `FIRST_SEEN`.

    Returns:
        How many pixels every date has data for. The others are no-data.
    """
    seen_pixels = 0
    with ExitStack() as stack:
        masks, percents = (
            [stack.enter_context(open_raster(folder / f"{name}.tif")) for folder in folders]
            for name in ("mask", "probability")
        )
        mask = stack.enter_context(NewRaster(work / "mask.tif", grid, "uint8", NO_LABEL))
        probability = stack.enter_context(NewRaster(work / "probability.tif", grid, "uint8", NO_LABEL, 0.01))
        dates = stack.enter_context(NewRaster(work / FIRST_SEEN, grid, "uint8"))
        for top in range(0, grid.height, BLOCK):
            window = _lines(grid, top)
            classes = np.stack([each.read(1, window=window) for each in masks])
            seen = (classes != NO_LABEL).all(0)
            first = first_seen((classes > 0) & seen, confirm)
            dates.write(first)
            shown = np.where(first, first, len(folders))[None] - 1  # the last does not mark what is no change
            mask.write(np.where(seen, np.take_along_axis(classes, shown, 0)[0], NO_LABEL))
            values = np.stack([each.read(1, window=window) for each in percents])
            probability.write(np.where(seen, np.take_along_axis(values, shown, 0)[0], NO_LABEL))
            seen_pixels += int(seen.sum())
    return seen_pixels


def date_regions(regions: Path, count: int, folders: dict[Pair, Path], grid: Grid, work: Path) -> list[Pair]:
    """The pair of dates that shows each region: the later is the one on which most of its pixels are first seen.

    The earlier is the date before it, if the comparison of these two marks most of the region too; else the first.

    Args:
        regions: raster of `Region.number`.
        count: how many there are.
        folders: of all comparisons, with their `mask.tif`.
        grid: of the scene.
        work: folder of `FIRST_SEEN`.
    """
    dates = max(later for _, later in folders) + 1
    votes = np.zeros((count + 1, dates), np.int64)
    marked = {later: np.zeros(count + 1, np.int64) for earlier, later in folders if earlier}
    with ExitStack() as stack:
        numbers, first = (stack.enter_context(open_raster(path)) for path in (regions, work / FIRST_SEEN))
        masks = {later: stack.enter_context(open_raster(folders[later - 1, later] / "mask.tif")) for later in marked}
        for top in range(0, grid.height, BLOCK):
            window = _lines(grid, top)
            own = numbers.read(1, window=window)
            changed = own > 0
            own = own[changed].astype(np.int64)
            places = own * dates + first.read(1, window=window)[changed]
            votes += np.bincount(places, minlength=votes.size).reshape(votes.shape)
            for later, mask in masks.items():
                classes = mask.read(1, window=window)[changed]
                marked[later] += np.bincount(own[(classes > 0) & (classes != NO_LABEL)], minlength=count + 1)
    found = []
    for number in range(1, count + 1):
        later = int(votes[number].argmax())
        near = later > 1 and 2 * marked[later][number] > votes[number].sum()
        found.append((later - 1 if near else 0, later))
    return found


def unconfirmed(changes: Sequence[Change], dates: Sequence[Date], confirm: int) -> list[str]:
    """The warning of changes that are first seen too late to be confirmed by so many dates."""
    late = [date.name for date in dates[len(dates) - confirm :]]
    count = sum(change.first_seen in late for change in changes)
    if not count:
        return []
    few = "the last date" if confirm == 1 else f"the last {confirm} dates"
    told = "1 change is" if count == 1 else f"{count:,} changes are"
    return [f"{told} first seen on {few} ({', '.join(late)}), too late to be confirmed: see first_seen."]


def _lines(grid: Grid, top: int) -> Window:
    """A strip of a raster, from a line on."""
    return Window(0, top, grid.width, min(BLOCK, grid.height - top))
