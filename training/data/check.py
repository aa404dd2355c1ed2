"""Check of a folder of pairs or of rows (`kcfi data check`): every problem, and what each split holds."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from kcfi.processing import InputError
from kcfi.training.data.levir_cc import FOLDERS, find_captions, is_datasets_name, open_folder
from kcfi.training.data.pairs import (
    CLASS_NAMES,
    CaptionedPair,
    UnreadablePairError,
    class_ids,
    num_classes,
    read_images,
)

CAPTIONS_PER_PAIR = 5  # of LEVIR-CC


@dataclass
class SplitCounts:
    """What a split holds, as far as it can be read.

    Attributes:
        pairs, changed, captions: By the captions file.
        without_captions: Pairs without a sentence: they train and score masks alone.
        masks: Pairs with a mask.
        disagreeing: Pairs whose `changeflag` says changed and whose mask is empty, or the reverse.
        pixels: Mask pixels of background, road and building.
    """

    pairs: int = 0
    changed: int = 0
    captions: int = 0
    without_captions: int = 0
    masks: int = 0
    disagreeing: int = 0
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(num_classes("road_building"), np.int64))

    def add(self, pair: CaptionedPair, pixels: NDArray[np.int64] | None) -> None:
        """Count a pair.

        Args:
            pair: Of the captions file.
            pixels: Mask pixels per class, None without a readable mask.
        """
        shown = pixels is not None and bool(pixels[1:].any())
        changed = shown if pair.changed is None else pair.changed
        self.pairs += 1
        self.changed += changed
        self.captions += len(pair.captions)
        self.without_captions += not pair.captions
        if pixels is not None:
            self.masks += 1
            self.disagreeing += changed != shown
            self.pixels += pixels


def check_folder(
    root: str | Path, columns: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, SplitCounts]]:
    """Read every file of a folder of pairs, or of its rows, and find everything that is wrong.

    Args:
        root: Folder in a layout of `levir_cc.py`, where a split without the folder `label` has no masks; or a folder
            that `datasets` opens.
        columns: What its rows call our columns, where the names differ.

    Returns:
        One line per problem, naming the file, and the counts of each split. A `changeflag` that disagrees with the
        mask is counted and no problem: LEVIR-MCI has such pairs. So is a pair without a sentence that has a mask.

    Raises:
        FileNotFoundError: If there is no such folder, or neither a captions file, nor masks, nor a file of rows in it.
        InputError: If the captions file is no such JSON, or `columns` is given for a folder without rows.
    """
    if Path(root).is_dir() and is_datasets_name(str(root)):
        return check_rows(Path(root), columns or {})
    images, pairs, problems = open_folder(Path(root))
    if columns:
        raise InputError(f"columns are for what `datasets` opens; {root} is a folder as distributed")
    # what names the pairs
    source = Path(root) / "*" / FOLDERS["image_before"] if images == Path(root) else find_captions(Path(root))
    for pair in pairs:
        problems += check_count(pair, str(source))
    problems += misplaced(images, pairs, source.name)
    counts: dict[str, SplitCounts] = defaultdict(SplitCounts)
    with ThreadPool() as pool:  # PIL decodes outside Python's lock
        checked = pool.imap(partial(check_pair, images), pairs)
        for pair, (found, pixels) in zip(pairs, tqdm(checked, "checking", len(pairs), unit="pair"), strict=True):
            problems += found or check_labels(pair, str(source), pixels)
            counts[pair.split].add(pair, pixels)
    return problems, dict(counts)


def check_rows(root: Path, columns: Mapping[str, str]) -> tuple[list[str], dict[str, SplitCounts]]:
    """`check_folder` for a folder that `datasets` opens; only the rows that can be read are counted."""
    from kcfi.training.data.rows import RowDataset, open_pairs  # `datasets` takes a second to import
    from kcfi.training.data.shards import Shard, complete_row, data_files, folders_of, open_shard, row_pair

    problems: list[str] = []
    shards: list[tuple[str, Shard]] = []
    others: list[tuple[str, RowDataset]] = []
    for split, files in data_files(str(root)).items():
        if not all(file.endswith(".parquet") for file in files):
            try:
                others.append((split, cast(RowDataset, open_pairs(str(root), split, columns))))
            except InputError as error:
                problems.append(str(error))
            continue
        for file in files:
            try:
                shards.append((split, open_shard(file, str(root), split, columns)))
            except InputError as error:
                problems.append(str(error))

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for split, shard in shards:
            try:
                table = shard.read()
            except InputError as error:
                problems.append(str(error))
                continue
            for number in range(len(table)):
                yield split, complete_row(table.slice(number, 1).to_pylist()[0], folders_of([shard.file]))
        for split, pairs in others:
            for number in range(len(pairs)):
                yield split, pairs.row(number)

    counts: dict[str, SplitCounts] = defaultdict(SplitCounts)
    seen: set[tuple[str, str]] = set()
    total = sum(shard.num_rows for _, shard in shards) + sum(len(pairs) for _, pairs in others)
    for split, row in tqdm(rows(), "checking", total, unit="pair"):
        name = f"{root}: {row['filename']}"
        if (split, row["filename"]) in seen:
            problems.append(f"{name} occurs more than once in split '{split}'")
        seen.add((split, row["filename"]))
        try:
            pair = row_pair(row, name, split)
        except InputError as error:
            problems.append(str(error))
            pair = row_pair({**row, "changed": False}, name, split)
        problems += check_count(pair, str(root))
        found, pixels = check_row(row, name)
        problems += found or check_labels(pair, str(root), pixels)
        counts[split].add(pair, pixels)
    return problems, dict(counts)


def check_count(pair: CaptionedPair, source: str) -> list[str]:
    """A line if a pair has captions, and not `CAPTIONS_PER_PAIR` of them."""
    count, expected = len(pair.captions), CAPTIONS_PER_PAIR
    return [] if count in (0, expected) else [f"{source}: {pair.filename} has {count} captions; expected {expected}"]


def check_labels(pair: CaptionedPair, source: str, pixels: NDArray[np.int64] | None) -> list[str]:
    """A line if a pair has nothing to learn from, or nothing that tells whether it changed.

    Args:
        pair: Whose images are in order.
        source: Where it is named.
        pixels: Of its mask; None without one.
    """
    if pixels is not None or (pair.captions and pair.changed is not None):
        return []
    missing = "a flag" if pair.captions else "a sentence"
    return [f"{source}: {pair.filename} has neither {missing} nor a mask"]


def misplaced(images: Path, pairs: Sequence[CaptionedPair], captions: str) -> list[str]:
    """Find folders that are missing, and folders and files that belong to no pair; hidden ones do not count.

    Args:
        images: The folder `images`.
        pairs: Of the captions file.
        captions: Name of the captions file.

    Returns:
        One line per problem.
    """
    listed: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        listed[pair.split].add(pair.filename)
    problems = [
        f"{folder}: no pair of split '{folder.name}' in {captions}"
        for folder in sorted(images.glob("[!.]*"))
        if folder.name not in listed and any((folder / name).is_dir() for name in FOLDERS.values())
    ]
    for split, filenames in listed.items():
        for key, name in FOLDERS.items():
            folder = images / split / name
            if key != "mask" and not folder.is_dir():
                problems.append(f"{folder}: no such folder; expected the images of split '{split}'")
            problems += [
                f"{path}: no pair of split '{split}' in {captions} has this file"
                for path in sorted(folder.glob("[!.]*"))
                if path.name not in filenames
            ]
    return problems


def check_pair(images: Path, pair: CaptionedPair) -> tuple[list[str], NDArray[np.int64] | None]:
    """Read the files of a pair from those folders that exist.

    Args:
        images: The folder `images`.
        pair: Of the captions file.

    Returns:
        One line per problem, and the mask pixels of background, road and building (3,); None without a mask that can
        be read.
    """
    folders = {key: images / pair.split / name for key, name in FOLDERS.items()}
    return check_images({key: folder / pair.filename for key, folder in folders.items() if folder.is_dir()})


def check_row(row: Mapping[str, Any], name: str) -> tuple[list[str], NDArray[np.int64] | None]:
    """`check_pair` for a row of a shard, whose problems stand under `name`."""
    from kcfi.training.data.shards import open_cell

    sources, problems = {}, []
    for key in FOLDERS:
        if key != "mask" or row.get(key) is not None:
            try:
                sources[key] = open_cell(row[key], f"{name} ({key})")
            except (FileNotFoundError, UnreadablePairError) as error:
                problems.append(str(error))
    found, pixels = check_images(sources)
    return problems + found, pixels


def check_images(
    sources: Mapping[str, Path | Image.Image],
) -> tuple[list[str], NDArray[np.int64] | None]:
    """What `check_pair` returns, of the images of a pair as `read_images` takes them."""
    found, errors = read_images(sources)
    problems = [
        f"{error.filename}: {error.strerror}" if isinstance(error, FileNotFoundError) else str(error)
        for error in errors
    ]
    if "mask" not in found:
        return problems, None
    try:
        mask = sources["mask"]
        ids = class_ids(found["mask"], "road_building", str(getattr(mask, "filename", mask)))
    except InputError as error:
        return [*problems, str(error)], None
    return problems, np.bincount(ids.ravel(), minlength=num_classes("road_building"))


def counts_table(counts: Mapping[str, SplitCounts]) -> str:
    """Lay out the counts of each split, one line per split under a line of titles.

    Args:
        counts: Of `check_folder`. "captions" is how many there are, "without" how many pairs have none.
    """
    classes = [f"{name} px" for name in CLASS_NAMES["road_building"]]
    rows = [["split", "pairs", "changed", "unchanged", "captions", "without", "with mask", *classes]]
    for split, count in counts.items():
        numbers = [count.pairs, count.changed, count.pairs - count.changed, count.captions, count.without_captions]
        rows.append([split, *map(str, [*numbers, count.masks, *count.pixels])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
