"""Pairs as rows of any data set that `datasets` opens: webdataset tars, image folders with metadata, JSON lines ...

`RowDataset` is map-style and visits its pairs in the order of `order.py`; `RowStream` reads rows one after the other,
as they come. `KCFITrainer` puts them around a `datasets.Dataset` and a `datasets.IterableDataset`; `open_pairs` opens
either by name. Folders of parquet are read by `shards.py`, unless they are to be streamed.

Columns are those of `shards.FEATURES`, or have other names (`columns`). A column of dictionaries has its entries as
columns too: the `captions` in the `.json` of a webdataset are `json.captions`. Images are decoded here rather than by
`datasets`, so that one that cannot be read is named.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from kcfi.processing import InputError
from kcfi.training.data.shards import (
    ShardDataset,
    commit_of,
    complete_row,
    folders_of,
    row_example,
    select_columns,
    split_files,
)

SHUFFLE_BUFFER = 256  # undecoded pairs that a streamed recipe draws from, in each reader: about 50 MB of LEVIR-CC


class _Rows:
    """What both data sets know of their rows.

    Args:
        rows: of `datasets`; columns that are not needed are not read.
        columns: What the data set calls our columns, where the names differ: `{"image_before": "A"}`.
        dataset: Its name, for errors (None: what `datasets` calls it).
        files: The files that the rows stand in: relative paths of images begin at their folders.

    Raises:
        InputError: A column is missing or of another type.

    Attributes:
        source: The arguments.
        commit: Of a data set on the Hub, by its files; else None.
    """

    def __init__(
        self,
        rows: datasets.Dataset | datasets.IterableDataset,
        columns: Mapping[str, str] | None = None,
        dataset: str | None = None,
        files: Sequence[str] = (),
    ) -> None:
        self.source = (rows, columns, dataset, files)
        self.dataset = dataset or rows.info.dataset_name or "data set"
        self.split = str(rows.split or "train")
        self.folders = folders_of(files) or ["."]
        self.commit = commit_of(files)
        typed = rows.features is not None
        features = rows.features if typed else datasets.Dataset.from_list([_first(rows, self.dataset)]).features
        self.columns = select_columns(_flat(features), self.dataset, columns or {})
        if typed:
            outer = [
                name for name in features if any(theirs in _flat({name: features[name]}) for theirs in self.columns)
            ]
            rows = rows.with_format(None).select_columns(outer)
            for name in outer:
                if isinstance(features[name], datasets.Image):
                    rows = rows.cast_column(name, datasets.Image(decode=False))
        self.rows: Any = rows

    def ours(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with our columns, images undecoded."""
        flat = _flat(row)
        return complete_row({name: flat[theirs] for theirs, name in self.columns.items()}, self.folders)

    def example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as the example of `pairs.py`."""
        return row_example(self.ours(row), self.dataset, self.split)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row, or the types of one, with the entries of its dictionaries beside it: "json" and "json.captions"."""
    inner = {
        f"{name}.{key}": value for name, cell in row.items() if isinstance(cell, dict) for key, value in cell.items()
    }
    return {**inner, **row}


def _first(rows: datasets.IterableDataset, dataset: str) -> dict[str, Any]:
    """The first row of a stream that does not know its types.

    Raises:
        InputError: it is empty.
    """
    for row in rows:
        return dict(row)
    raise InputError(f"{dataset}: the stream has no pair")


class RowDataset(_Rows, Dataset[dict[str, Any]]):
    """Map-style pairs of a `datasets.Dataset`; yields the example of `pairs.py`.

    A stream is read to its end at construction and its undecoded rows are kept in memory: that is how a streamed
    split is evaluated, which comes round again and has to be shared out evenly among ranks.

    Args:
        rows: As of `_Rows`.
        columns: Likewise.
        dataset: Likewise.
        files: Likewise.

    Raises:
        InputError: At construction, for columns that do not fit, or a stream that ranks share already; by an example,
            if an image cannot be read, the mask is coloured, or the sizes differ.
        FileNotFoundError: By an example, if the file of an image is missing.
    """

    def __init__(
        self,
        rows: datasets.Dataset | datasets.IterableDataset,
        columns: Mapping[str, str] | None = None,
        dataset: str | None = None,
        files: Sequence[str] = (),
    ) -> None:
        super().__init__(rows, columns, dataset, files)
        if isinstance(rows, datasets.IterableDataset):
            if _is_shared(rows):
                raise InputError(f"{self.dataset}: give the whole evaluation data; it is shared out among ranks here")
            self.rows = list(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        """A pair with the columns of `shards.FEATURES`, images undecoded."""
        return self.ours(self.rows[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.example(self.rows[index])


class Position(NamedTuple):
    """How far a reader of a `RowStream` has come: a loader worker of a rank, or the rank where it has none.

    Attributes:
        pairs: Read in all.
        epoch: Pass over the data, from 0.
        row: Rows of this pass that were read.
        filename: Of the last of them.
    """

    pairs: int = 0
    epoch: int = 0
    row: int = 0
    filename: str = ""


class RowStream(_Rows, IterableDataset[dict[str, Any] | None]):
    """Endless pairs of a `datasets.IterableDataset`, pass after pass, in its own order.

    - **Order**: that of the data set; `shuffle` it, with a seed, for another. `datasets` shuffles the shards anew in
      every pass, by (seed, number of the pass).
    - **Ranks** share by `split_dataset_by_node`: shards where their number is a multiple of the ranks', else each rank
      takes every n-th row and reads the others. **Loader workers** share the shards of a rank. So each pass visits
      every pair once on one reader; a reader with fewer pairs begins its next pass sooner, so that no rank waits.
    - **Resume**: a reader goes through the rows of the pass that it was in, undecoded, up to its `Position`. That is
      exact with a shuffle buffer too, unlike the `state_dict` of `datasets`. If another row stands there (shuffled
      without a seed, other data), the run is refused.

    An example has two more keys than `pairs.py` says: "epoch", the number of its pass, and "position", the
    `Position` behind it. Pairs that a resumed run was trained on come as None, unread: Trainer skips their batches.

    Args:
        rows: As of `_Rows`.
        columns: Likewise.
        dataset: Likewise.
        files: Likewise.

    Attributes:
        rank, ranks: Of this process, and how many there are.
        positions: Of the run to resume, by the number of the worker (0 without workers).

    Raises:
        InputError: At construction, for columns that do not fit; by an example, if an image cannot be read, the mask
            is coloured, the sizes differ, the data set is empty or does not come in the order of the run to resume.
        FileNotFoundError: By an example, if the file of an image is missing.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        columns: Mapping[str, str] | None = None,
        dataset: str | None = None,
        files: Sequence[str] = (),
    ) -> None:
        super().__init__(rows, columns, dataset, files)
        self.rank, self.ranks = 0, 1
        self.positions: dict[int, Position] = {}

    def shuffled(self, seed: int) -> "RowStream":
        """The same pairs in random order: shards, and rows within `SHUFFLE_BUFFER`."""
        stream = copy(self)
        stream.rows = self.rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        return stream

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        worker = get_worker_info()
        start = self.positions.get(worker.id if worker else 0, Position())
        yield from repeat(None, start.pairs)
        pairs, epoch, done = start.pairs, start.epoch, start.row
        # an object of this reader alone: `datasets` keeps the number of the pass where all workers of a loader see it
        rows = split_dataset_by_node(self.rows, *((0, 1) if _is_shared(self.rows) else (self.rank, self.ranks)))
        while True:
            rows.set_epoch(epoch)
            number = 0
            for number, row in enumerate(rows, start=1):
                if number < done:
                    continue
                if number == done:
                    self._check_order(row, start)
                    continue
                pairs += 1
                example = self.example(row)
                yield {**example, "epoch": epoch, "position": Position(pairs, epoch, number, example["filename"])}
            if number < done:
                self._check_order(None, start)
            if not pairs and worker is None:
                raise InputError(f"{self.dataset}: the stream has no pair for rank {self.rank} of {self.ranks}")
            if not pairs:  # more workers than shards: `datasets` says so
                return
            epoch, done = epoch + 1, 0

    def _check_order(self, row: Mapping[str, Any] | None, start: Position) -> None:
        filename = self.ours(row)["filename"] if row else "missing"
        if filename != start.filename:
            raise InputError(
                f"{self.dataset}: pair {start.row} of pass {start.epoch} is {filename}, but was {start.filename} in "
                "the run to resume. Streamed data must come in the same order: the same files, and a seed for "
                "`shuffle(seed=...)`."
            )


def _is_shared(rows: datasets.IterableDataset) -> bool:
    """Whether `split_dataset_by_node` was applied already, by hand; twice would lose pairs."""
    return rows._distributed is not None


def open_pairs(
    dataset: str,
    split: str,
    columns: Mapping[str, str] | None = None,
    num_pairs: int | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> ShardDataset | RowDataset | RowStream:
    """Open a split of a folder or of a data set on the Hub with whatever builder `datasets` finds for it.

    Args:
        dataset: Folder, or a Hub id.
        split: Name of the split.
        columns: What the data set calls our columns, where the names differ.
        num_pairs: Take so many of the first pairs at most (None: all).
        revision: Branch, tag or commit of a data set on the Hub (None: the newest).
        streaming: Read the rows as they come, in a `RowStream`. Otherwise parquet is read shard by shard, and all else
            is prepared in the cache of `datasets` first (`HF_HOME`).

    Raises:
        FileNotFoundError: There is no such data set or the Hub cannot be reached.
        InputError: The split is unknown, `datasets` cannot open it, or its columns do not fit.
    """
    files = split_files(dataset, split, revision)
    if not streaming and all(file.endswith(".parquet") for file in files):
        return ShardDataset(dataset, split, columns, num_pairs, revision)
    try:
        rows = datasets.load_dataset(dataset, split=split, revision=commit_of(files) or revision, streaming=streaming)
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{dataset}: `datasets` cannot open it ({error})") from error
    if streaming:
        return RowStream(rows if num_pairs is None else rows.take(num_pairs), columns, dataset, files)
    if num_pairs is not None:
        rows = rows.select(range(min(num_pairs, len(rows))))
    try:
        return RowDataset(rows, columns, dataset, files)
    except InputError as error:
        archive = next((file for file in files if file.endswith((".zip", ".tar.gz", ".tgz"))), None)
        if archive is None:
            raise
        raise InputError(
            f"{error}. If {Path(archive).name} is LEVIR-CC as it is distributed, get it here (`hf download {dataset} "
            "--repo-type dataset --local-dir FOLDER`) and make shards of it (`kcfi data convert FILE --output DIR`)."
        ) from error
