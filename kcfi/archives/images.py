"""Pairs of images -> what the table says of them, and their pictures."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kcfi.archives.fetch import fetch, reason
from kcfi.archives.job import Job
from kcfi.pictures import save_pictures
from kcfi.processing import Describer, InputError
from kcfi.processing.describer_kcfi import ChangeReport, Pair
from kcfi.processing.reading_kcfi import read_pair

BYTES_PER_PIXEL = 8  # of a file that is fetched, at most: four bands of 16 bits
AHEAD = 4  # pairs that are opened before the model, on a GPU, needs them; a CPU has the model to compute: one

Row = dict[str, Any]
Opened = tuple[Row, Pair | str]  # a pair with its images, or with what is wrong with them


def describe_images(rows: Sequence[Row], describer: Describer, job: Job, output: Path) -> Iterator[Row]:
    """Describe pairs; those that fit into a tile together, larger ones alone, and the next are read meanwhile.

    Args:
        rows: `name`, `before` and `after` of each.
        describer: of the model.
        job: what is done to each.
        output: folder for the pictures.

    Yields:
        For each pair, in their order, columns of `blocks.IMAGES`: those that were found, or `error`.
    """
    for batch in _batches(_opened(rows, describer, job), describer):
        readable = [images for _, images in batch if not isinstance(images, str)]
        reports = iter(describer.describe_pairs(readable, job.regions))
        for row, images in batch:
            if isinstance(images, str):
                yield {"error": images}
            else:
                report = next(reports)
                pictures = _save(report, images, row["name"], describer, job, output) if job.pictures else {}
                yield _columns(report, job) | pictures


def _columns(report: ChangeReport, job: Job) -> Row:
    """What the table says of a pair."""
    names = ("score", "changed_fraction", "changed_probability")
    columns: Row = {name: getattr(report, name) for name in names}
    columns["caption"] = " ".join(report.caption.split())  # a row is a line
    columns["caption_box"] = list(report.caption_box)
    if job.regions:
        columns["regions"] = [{**vars(region), "box": list(region.box)} for region in report.regions]
    return columns


def _save(report: ChangeReport, images: Pair, name: str, describer: Describer, job: Job, output: Path) -> Row:
    """Write the pictures of a pair; their names, by kind."""
    classes = describer.model.config.num_change_classes
    paths = save_pictures(report, images[1], output, name, classes, job.heatmap)
    return {kind: Path(path).name for kind, path in paths.items()}  # not the folder, which may move


def _opened(rows: Sequence[Row], describer: Describer, job: Job) -> Iterator[Opened]:
    """Pairs with their images; some are read ahead."""
    reading = describer.reading(**job.reading)
    ahead = 1 if describer.model.device.type == "cpu" else AHEAD
    waiting: deque[Any] = deque()
    with ThreadPoolExecutor(ahead) as pool:
        for row in rows:
            waiting.append((row, pool.submit(_open, row, reading)))
            if len(waiting) > ahead:
                first, images = waiting.popleft()
                yield first, images.result()
        for first, images in waiting:
            yield first, images.result()


def _open(row: Row, reading: dict[str, Any]) -> Pair | str:
    """The images of a pair, or what is wrong with them."""
    with TemporaryDirectory() as folder:
        copies = {Path(folder, date): row[date] for date in ("before", "after")}
        limit = BYTES_PER_PIXEL * reading["max_image_pixels"]
        try:
            return read_pair(*(fetch(source, place, limit) for place, source in copies.items()), **reading)
        except (OSError, InputError) as error:
            return reason(error, copies)


def _batches(opened: Iterable[Opened], describer: Describer) -> Iterator[list[Opened]]:
    """Pairs that fit into a tile, as many as the model takes at a time; larger ones alone."""
    batch: list[Opened] = []
    for row, images in opened:
        alone = not isinstance(images, str) and not describer.fits(images[0])
        if batch and (alone or len(batch) == describer.batch_size):
            yield batch
            batch = []
        if alone:
            yield [(row, images)]
        else:
            batch.append((row, images))
    if batch:
        yield batch
