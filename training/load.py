"""The one door to pairs: any data set by the name that recipes and commands use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from kcfi.processing import InputError
from kcfi.training.data.levir_cc import LevirCCDataset, is_datasets_name

# Pairs that "synthetic" draws when nobody says how many; 500 is the size of the embedded model's test.
SYNTHETIC_PAIRS = {"train": 5000, "val": 500, "test": 500}


def load_pairs(
    dataset: str,
    split: str,
    num_pairs: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    materials: str | None = None,
    pair_mix: Mapping[str, float] | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Dataset[Any]:
    """Open a data set by the name that recipes and commands use.

    Args:
        dataset: "synthetic", a folder in the layout of LEVIR-CC, LEVIR-MCI or LEVIR-CD, or what `datasets` opens: a
            folder of parquet shards, webdataset tars, images with metadata or JSON lines, or a Hub id.
        split: "train", "val" or "test", or what the data set calls them.
        num_pairs: Pairs that "synthetic" draws (None: `SYNTHETIC_PAIRS`), or how many of the first pairs of any other
            data set to take at most (None: all).
        seed: Seed of "synthetic"; the others have none.
        columns: What a data set that `datasets` opens calls our columns, where the names differ; see `rows.py`.
        materials: Library of real surfaces that "synthetic" draws with (`kcfi data materials`).
        pair_mix: Kinds of pairs of "synthetic", see `SyntheticDataset`.
        revision: Branch, tag or commit of a data set on the Hub (None: the newest).
        streaming: Read what `datasets` opens row by row, as a `RowStream` without a length.

    Returns:
        Data set of examples as in `pairs.py`, map-style unless `streaming`.

    Raises:
        FileNotFoundError: If the data set or a part of it is missing.
        InputError: If `num_pairs` is below 1, the split is unknown, the folder's JSON or the columns are refused, or
            `columns`, `materials`, `pair_mix`, `revision` or `streaming` is given for a data set that has none.
    """
    if num_pairs is not None and num_pairs < 1:
        raise InputError(f"num_pairs is {num_pairs}; expected at least 1")
    if columns and not is_datasets_name(dataset):
        raise InputError(f"columns are for parquet shards and Hub ids; {dataset} is neither")
    if streaming and not is_datasets_name(dataset):
        raise InputError(f"streaming is for what `datasets` opens, parquet shards or a Hub id; {dataset} is neither")
    if revision and (not is_datasets_name(dataset) or Path(dataset).is_dir()):
        raise InputError(f"dataset_revision {revision} is for a data set on the Hub; {dataset} is none")
    if (materials or pair_mix) and dataset != "synthetic":
        raise InputError(f"materials and pair_mix are for dataset 'synthetic'; {dataset} comes as it is")
    if dataset == "synthetic":
        from kcfi.training.synthetic.dataset import SyntheticDataset  # a folder needs none of its drawing code
        from kcfi.training.synthetic.material_library import LibraryMaterials

        if split not in SYNTHETIC_PAIRS:
            raise InputError(f"split '{split}' is unknown; 'synthetic' has {', '.join(SYNTHETIC_PAIRS)}")
        library = LibraryMaterials(materials, split) if materials else None
        count = num_pairs or SYNTHETIC_PAIRS[split]
        return SyntheticDataset(count, split, seed, materials=library, pair_mix=pair_mix)
    if is_datasets_name(dataset):
        from kcfi.training.data.rows import open_pairs  # `datasets` takes a second to import

        return open_pairs(dataset, split, columns, num_pairs, revision, streaming)
    pairs = LevirCCDataset(dataset, split)
    return pairs if num_pairs is None else Subset(pairs, range(min(num_pairs, len(pairs))))
