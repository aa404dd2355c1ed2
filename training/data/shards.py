"""Pairs as parquet shards, here or on the Hub: the reader, and the writer (`kcfi data convert`).

```
SHARDS/README.md                                    dataset card: names the files of every split
SHARDS/data/{split}-00000-of-00027.parquet          `PAIRS_PER_SHARD` rows with the columns of `FEATURES`
```

**Reading is streaming**: opening a data set reads the number of rows and the columns of each shard and nothing else.
A shard is read when a pair of it is asked for. From the Hub it is fetched then, and stays in the cache (`HF_HOME`), so
that the first step waits for one shard and the second epoch for none. Training asks shard after shard (`order.py`).

The images are the bytes of the files they came from. They are decoded here rather than by `datasets`, so that one
reader serves files and shards, and an unreadable image is named.
"""

import errno
import io
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import yaml
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from kcfi.files import check_names, check_new_folder, move_into_place
from kcfi.processing import InputError, refusing
from kcfi.training.data.archive import unpacked
from kcfi.training.data.levir_cc import LevirCCDataset, open_folder
from kcfi.training.data.pairs import CaptionedPair, UnreadablePairError

# Columns of a shard. Other data sets need the same, under any names (`select_columns`), but for `split` and for `mask`
# or, where there are masks, `captions` and `changed`.
FEATURES = datasets.Features(
    {
        "image_before": datasets.Image(),
        "image_after": datasets.Image(),
        "mask": datasets.Image(),
        "captions": datasets.List(datasets.Value("string")),
        "changed": datasets.Value("bool"),
        "filename": datasets.Value("string"),
        "split": datasets.Value("string"),
    }
)
_IMAGES = ("image_before", "image_after", "mask")

MOST_BYTES = 2**32  # of a shard, unpacked
CONVERTED = (
    "Converted by `kcfi data convert` from a folder in the layout of LEVIR-CC or LEVIR-MCI. The images are the files "
    "of that\nfolder, byte for byte. The terms of the data set that they come from apply."
)
PAIRS_PER_SHARD = 256  # LEVIR-CC's training split in 27 shards: enough to share out among ranks and loader workers


class ShardDataset(Dataset[dict[str, Any]]):
    """One split of a folder of parquet shards or of a data set on the Hub; yields the example of `pairs.py`.

    It holds the undecoded rows of one shard, that of the last pair. So ask for the pairs shard by shard: in their
    order, or in that of `order.py`.

    Args:
        dataset: Folder of shards, or a Hub id.
        split: Name of the split.
        columns: What the data set calls our columns, where the names differ: `{"image_before": "A"}`.
        num_pairs: Take so many of the first pairs at most (None: all).
        revision: Branch, tag or commit of a data set on the Hub (None: the newest).

    Attributes:
        sizes: Pairs in each shard.
        commit: Of a data set on the Hub, else None.

    Raises:
        FileNotFoundError: At construction, if there is no such data set or the Hub cannot be reached.
        InputError: At construction, for an unknown split, a file that is no parquet, a column that is missing or of
            another type; by an example, if an image cannot be read, the mask is coloured, or the sizes differ.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        columns: Mapping[str, str] | None = None,
        num_pairs: int | None = None,
        revision: str | None = None,
    ) -> None:
        self.dataset, self.split = dataset, split
        files = split_files(dataset, split, revision)
        self.commit = commit_of(files)
        progress = tqdm(files, "opening shards", unit="shard", leave=False, delay=2)
        self.shards = [open_shard(file, dataset, split, columns or {}) for file in progress]
        self._count([range(shard.num_rows) for shard in self.shards])
        if num_pairs is not None:
            self.keep(range(num_pairs))
        self._read: tuple[int, Any] = (-1, None)  # number of a shard, and its rows

    def _count(self, rows: list[Sequence[int]]) -> None:
        """Take the rows of every shard that are pairs."""
        self.rows = rows
        self.sizes = [len(some) for some in rows]
        self.ends = list(accumulate(self.sizes))

    def keep(self, indices: Container[int]) -> None:
        """Have no other pairs than these from now on; they stay in their order.

        Args:
            indices: Of pairs; what is beyond the last one is left out of account.
        """
        pairs = zip([0, *self.ends], self.rows, strict=False)
        self._count([[row for index, row in enumerate(rows, start) if index in indices] for start, rows in pairs])

    def column(self, name: str) -> list[Any]:
        """What all pairs have in one of the columns of `FEATURES`; no other column is read.

        Args:
            name: Ours of a column without images, whatever the data set calls it.

        Returns:
            A value per pair as in its example; None where there is none.
        """
        values: list[Any] = []
        for shard, rows in zip(self.shards, self.rows, strict=True):
            if name in shard.columns.values() and rows:
                cells = shard.read([name])[name].to_pylist()
                values += [complete_row({name: cells[row]}, ())[name] for row in rows]
            else:
                values += [None] * len(rows)
        return values

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)} pairs in {self.dataset}")
        number = bisect_right(self.ends, index)
        if self._read[0] != number:
            self._read = (-1, None)  # never two of them in memory
            self._read = (number, self.shards[number].read())
        place = self.rows[number][index - self.ends[number] + self.sizes[number]]
        row = self._read[1].slice(place, 1).to_pylist()[0]
        return row_example(complete_row(row, folders_of([self.shards[number].file])), self.dataset, self.split)


@dataclass(frozen=True)
class Shard:
    """A parquet file of which only the footer was read.

    Attributes:
        file: Path or URL.
        num_rows: Pairs in it.
        columns: Our name of each column that is read, by its name in the file.
    """

    file: str
    num_rows: int
    columns: dict[str, str]

    def read(self, names: Collection[str] = tuple(FEATURES)) -> Any:
        """Fetch the file, if it is on the Hub and not in the cache, and read its rows as an Arrow table.

        Args:
            names: Ours of the columns to read; those that the file lacks are left out.

        Raises:
            ValueError: If the file is damaged; names it.
        """
        columns = {theirs: ours for theirs, ours in self.columns.items() if ours in names}
        path = datasets.DownloadManager().download(self.file)
        with refusing(f"{self.file}: not readable as parquet"), pyarrow.parquet.ParquetFile(path) as parquet:
            table = parquet.read(list(columns))
        return table.select(list(columns)).rename_columns(list(columns.values()))


def data_files(dataset: str, revision: str | None = None) -> dict[str, list[str]]:
    """The files of every split of a folder or of a data set on the Hub, as its card or else their names say.

    Args:
        dataset: Folder or Hub id.
        revision: Branch, tag or commit of a data set on the Hub (None: the newest).

    Raises:
        FileNotFoundError: If there is no such data set, it is empty, or the Hub cannot be reached.
        InputError: If `datasets` finds no way to open it.
    """
    try:
        splits = datasets.load_dataset_builder(dataset, revision=revision).config.data_files or {}
    except (FileNotFoundError, ConnectionError) as error:
        if Path(dataset).is_dir():
            raise
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{dataset}: neither a folder nor a data set on the Hub{at} ({error}). Without a network, give the folder "
            f"of a copy (`hf download {dataset} --repo-type dataset --local-dir FOLDER`)."
        ) from error
    except Exception as error:  # of a builder or a card, which may be anybody's
        raise InputError(f"{dataset}: `datasets` cannot open it ({error})") from error
    return {str(name): [str(file) for file in splits[name]] for name in splits}


def split_files(dataset: str, split: str, revision: str | None = None) -> list[str]:
    """Paths or URLs of the files of a split, in the order of their rows; see `data_files`.

    Raises:
        FileNotFoundError: If there is no such data set or the Hub cannot be reached.
        InputError: If the split is unknown.
    """
    files = data_files(dataset, revision)
    if split not in files:
        raise InputError(f"{dataset}: no split '{split}'; splits of the data set: {', '.join(files)}")
    return files[split]


def commit_of(files: Iterable[str]) -> str | None:
    """The commit in the URLs of a data set's files on the Hub, which `datasets` has resolved; None elsewhere."""
    found = re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", next(iter(files), ""))
    return found[1] if found else None


def folders_of(files: Iterable[str]) -> list[str]:
    """The folders that files lie in, each once: where relative paths of images begin."""
    return list(dict.fromkeys(file.rpartition("/")[0] for file in files))


def open_shard(file: str, dataset: str, split: str, columns: Mapping[str, str]) -> Shard:
    """Read the footer of a parquet file.

    Args:
        file: Path or URL.
        dataset: Name of the data set, for errors.
        split: Name of the split, for errors.
        columns: As in `ShardDataset`.

    Raises:
        InputError: If the file is no parquet or larger than `MOST_BYTES`, or `select_columns` refuses its columns.
    """
    with refusing(f"{dataset}, split '{split}': {file} is not readable as parquet"), fsspec.open(file) as stream:
        footer = pyarrow.parquet.ParquetFile(stream)
        rows, features = footer.metadata.num_rows, datasets.Features.from_arrow_schema(footer.schema_arrow)
        groups = [footer.metadata.row_group(number) for number in range(footer.metadata.num_row_groups)]
    unpacked = sum(group.total_byte_size for group in groups)
    if unpacked > MOST_BYTES:
        raise InputError(
            f"{dataset}, split '{split}': {file} says that it holds {unpacked / 2**30:.1f} GiB, but it is read as a "
            f"whole: write more shards, of less than {MOST_BYTES >> 30} GiB each."
        )
    return Shard(file, rows, select_columns(features, dataset, columns))


def select_columns(features: Mapping[str, Any], dataset: str, columns: Mapping[str, str]) -> dict[str, str]:
    """Find our columns among those of a data set.

    Args:
        features: Types of its columns.
        dataset: Its name, for errors.
        columns: As in `ShardDataset`.

    Returns:
        Our name of each column that is needed, by its name in the data set.

    Raises:
        InputError: If `columns` has an unknown key, or a column is missing or of another type than in `FEATURES`.
            Texts may stand for images (their paths) and for captions (a pair with one), 0 and 1 for `changed`. `mask`
            may be missing; with it, `captions` and `changed` may.
    """
    ours = [name for name in FEATURES if name != "split"]
    check_names(columns, ours, "entry of columns")
    has_masks = columns.get("mask", "mask") in features
    for name in ("captions", "changed") if has_masks else ("mask",):
        if name not in columns and name not in features:
            ours.remove(name)
    theirs = {columns.get(name, name): name for name in ours}
    if len(theirs) < len(ours) or not set(theirs) <= set(features):
        raise InputError(
            f"{dataset}: its columns are {', '.join(features)}, but there must be one for each of "
            f"{', '.join(ours)}. Say which in `columns`, for example columns: {{image_before: A}}"
        )
    for their_name, name in theirs.items():
        feature = features[their_name]
        text = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
        unknown = name == "mask" and feature == datasets.Value("null")  # nothing but None so far
        if not (isinstance(feature, type(FEATURES[name])) or (text and name in (*_IMAGES, "captions")) or unknown):
            raise InputError(f"{dataset}: {name} is a column of {feature}; expected {FEATURES[name]}")
    return theirs


def complete_row(row: Mapping[str, Any], folders: Iterable[str]) -> dict[str, Any]:
    """Bring a row with our names of columns into the types of `FEATURES`, images undecoded.

    Args:
        row: Where `select_columns` allows a text, it may hold one.
        folders: Where relative paths of images begin; one of them must hold the file.

    Raises:
        UnreadablePairError: If several folders hold the file.
    """
    complete = dict(row)
    for key in _IMAGES:
        if isinstance(row.get(key), str):
            complete[key] = {"bytes": None, "path": find_image(row[key], folders)}
    if isinstance(row.get("captions"), str):
        complete["captions"] = [row["captions"]]
    return complete


def find_image(path: str, folders: Iterable[str]) -> str:
    """Path or URL of an image that a row names relative to the folder of its own file; absolute ones stay.

    Raises:
        UnreadablePairError: If several folders hold it, or a data set on the Hub names a file outside of its own.
    """
    folders = list(folders)
    leads_out = "://" in path or Path(path).is_absolute() or ".." in Path(path).parts
    if leads_out and any(folder.startswith("hf://") for folder in folders):
        raise UnreadablePairError(f"{path}: a data set on the Hub may name files of its own only.")
    if "://" in path or Path(path).is_absolute():
        return path
    places = [f"{folder}/{path}" for folder in folders]
    if len(places) == 1:
        return places[0]
    found = []
    for place in places:
        files, name = fsspec.core.url_to_fs(place)
        found += [place] if files.exists(name) else []
    if len(found) > 1:
        raise UnreadablePairError(f"{path} is ambiguous: {' and '.join(found)} exist. Write longer paths.")
    return found[0] if found else places[0]


def row_example(row: Mapping[str, Any], dataset: str, split: str) -> dict[str, Any]:
    """Decode a row: the example of `pairs.py`.

    Args:
        row: Columns of `FEATURES`, images undecoded (`bytes` and `path`); `mask`, `captions` and `changed` may be
            absent or None.
        dataset: Name of the data set, for errors.
        split: Name of the split.

    Raises:
        FileNotFoundError: If an image is a path and not there.
        InputError: If an image cannot be read, the mask is coloured, the sizes differ, or `changed` is not 0 or 1, or
            is absent without a mask.
    """
    name = f"{dataset}: {row['filename']}"
    pair = row_pair(row, name, split)
    sources = {
        key: open_cell(row[key], f"{name} ({key})") for key in _IMAGES if key != "mask" or row.get("mask") is not None
    }
    return pair.example(sources)


def row_pair(row: Mapping[str, Any], name: str, split: str) -> CaptionedPair:
    """What a row says about its pair.

    Raises:
        InputError: If `changed` is neither 0 nor 1 nor absent, or the file name or a caption is no text; begins with
            `name`.
    """
    changed = row.get("changed")
    texts = [row["filename"], *(row.get("captions") or [])]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name}: expected texts for filename and captions, got {texts!r}")
    if changed not in (0, 1, None):
        raise InputError(f"{name}: changed is {changed!r}; expected true or false, or 1 or 0")
    flag = None if changed is None else bool(changed)
    return CaptionedPair(row["filename"], flag, row.get("captions") or [], split)


def open_cell(cell: dict[str, Any] | Image.Image | None, name: str) -> Image.Image:
    """Open an image under a name that errors show.

    Args:
        cell: Undecoded, with `bytes`, or the `path` or URL of a file; or an image.
        name: That name.

    Raises:
        FileNotFoundError: If it is a path and not there.
        UnreadablePairError: If there is none, or it is no image.
    """
    if cell is None:
        raise UnreadablePairError(f"{name}: no image")
    image: Any = cell
    if not isinstance(cell, Image.Image):
        try:
            image = Image.open(io.BytesIO(read_file(cell["path"]) if cell["bytes"] is None else cell["bytes"]))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}: no such file ({cell['path']})") from error
        except Exception as error:  # whatever a decoder raises, as in `refusing`
            raise UnreadablePairError(f"{name}: cannot be read as an image ({error}).") from error
    image.filename = name
    return cast(Image.Image, image)


def read_file(path: str) -> bytes:
    """The bytes of a file, here or elsewhere: `hf://...`, or in an archive, `zip://A/1.png::hf://...`."""
    if "://" not in path and not Path(path).is_file():  # a device has no end
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    with fsspec.open(path) as stream:
        content: bytes = stream.read()
    return content


def write_shards(root: str | Path, output: str | Path, origin: str = CONVERTED) -> None:
    """Copy pairs into parquet shards with a dataset card (`kcfi data convert`).

    The images are copied byte for byte and not looked into: that is what `kcfi data check` does. The folder appears
    under its name when it is complete. The pairs of the split "train" are shuffled, so that each shard is a sample of
    them all: LEVIR-CC ends in hundreds of unchanged pairs, and training reads one shard after the other.

    Args:
        root: Folder in a layout of `levir_cc.py`, or an archive (zip, tar) of one; all its splits are converted.
        output: Folder to create; it must be new or empty.
        origin: What the card says of where the pairs come from.

    Raises:
        FileExistsError: If `output` is not empty.
        FileNotFoundError: If `root`, a part of it or an image is missing.
        InputError: If the captions file or the archive is refused.
    """
    root, output = Path(root), Path(output)
    check_new_folder(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if root.is_file():
        with unpacked(root, output.parent) as folder:
            write_shards(folder, output, origin)
        return
    _, pairs, problems = open_folder(root)
    if problems or not pairs:
        raise InputError(problems[0] if problems else f"{root}: there is no pair")
    sources = [LevirCCDataset(root, split) for split in dict.fromkeys(pair.split for pair in pairs)]
    with (
        TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary,
        tqdm(desc="converting", total=len(pairs), unit="pair") as bar,
    ):
        folder = Path(temporary) / "shards"
        (folder / "data").mkdir(parents=True)
        for source in sources:
            split, starts = source.pairs[0].split, range(0, len(source), PAIRS_PER_SHARD)
            order = np.random.default_rng(0).permutation(len(source)) if split == "train" else np.arange(len(source))
            for number, start in enumerate(starts):
                rows = [_row(source, index) for index in order[start : start + PAIRS_PER_SHARD]]
                file = folder / "data" / f"{split}-{number:05d}-of-{len(starts):05d}.parquet"
                datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(file)
                bar.update(len(rows))
        (folder / "README.md").write_text(dataset_card(sources, folder, origin), encoding="utf-8")
        move_into_place(folder, output)


def _row(source: LevirCCDataset, index: int) -> dict[str, Any]:
    """A pair with the columns of `FEATURES`; images as bytes, for a path might mean another file elsewhere."""
    files = {key: path.read_bytes() for key, path in source.files(index).items()}
    return {"mask": None, **files, **vars(source.pairs[index])}


def dataset_card(sources: list[LevirCCDataset], folder: Path, origin: str) -> str:
    """Write the README.md of a data set: what `datasets.load_dataset` needs to find the splits, and what it holds.

    Args:
        sources: What was converted, one per split.
        folder: Where the shards are.
        origin: Where the pairs come from, in sentences.
    """
    splits = [source.pairs[0].split for source in sources]
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    sizes = [
        {
            "name": split,
            "num_bytes": sum(file.stat().st_size for file in folder.glob(f"data/{split}-*")),
            "num_examples": len(source),
        }
        for split, source in zip(splits, sources, strict=True)
    ]
    header = yaml.safe_dump(
        # the sizes are in the key of the cache of `datasets`: two folders of one name are told apart
        {"configs": [{"config_name": "default", "data_files": files}], "dataset_info": {"splits": sizes}},
        sort_keys=False,
    )
    table = ["| split | pairs | changed | unchanged | captions | masks |", "|---|---|---|---|---|---|"]
    for split, source in zip(splits, sources, strict=True):
        changed = Counter(pair.changed for pair in source.pairs)
        captions = sum(len(pair.captions) for pair in source.pairs)
        masks = "yes" if source.has_masks else "no"
        flags = f"{changed[True]} | {changed[False]}" if None not in changed else "by the mask | by the mask"
        table.append(f"| {split} | {len(source)} | {flags} | {captions} | {masks} |")
    return f"""---
{header}---

# Pairs of aerial images with captions of what changed

{origin}

{chr(10).join(table)}

| column | holds |
|---|---|
| `image_before`, `image_after` | the two dates, of one size |
| `mask` | where the later image changed: 0 = not, 128 = road, 255 = building; null = no mask |
| `captions` | sentences about the pair; empty where it has a mask alone |
| `changed` | the data set's own flag; it may disagree with the mask; null = as the mask shows |
| `filename`, `split` | where the pair comes from |

```python
from datasets import load_dataset

pairs = load_dataset("<this folder, or its Hub id>", split="{splits[0]}")
```

`kcfi train <recipe> --dataset <this folder, or its Hub id>` trains on it.
"""
