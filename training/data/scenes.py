"""A few pairs of many, scene by scene: what a smaller number takes, a larger one takes too.

Crops of one scene touch each other and share roofs, light and season. So 38 crops of 38 scenes tell more than 38 crops
of three, and who labels pairs labels whole scenes: whole scenes are taken. Which, is a function of file names and a
seed alone: what `choose(names, 38, 16, seed)` takes is a part of what `choose(names, 152, 16, seed)` takes.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Subset

from kcfi.processing import InputError
from kcfi.training.data.levir_cc import LevirCCDataset
from kcfi.training.data.readable_pairs import ReadablePairs
from kcfi.training.data.rows import RowDataset
from kcfi.training.data.shards import ShardDataset


def scene_of(filename: str, crops: int) -> str:
    """The scene that a pair was cut from, by the number in its file name.

    Args:
        filename: Ends in the number of the crop, from 1: "val_000017.png".
        crops: That every scene has; scene k holds the numbers from `crops * (k - 1) + 1` to `crops * k`. LEVIR-CC cut
            16 crops of 256 px from each scene of LEVIR-CD.

    Returns:
        "val_ 2" for crop 17 of 16 per scene: what stands before the number, and the number of the scene.

    Raises:
        InputError: There is no such number.
    """
    match = re.fullmatch(r"(.*?)0*([1-9]\d*)\.\w+", filename)
    if match is None:
        raise InputError(
            f"{filename}: its name does not end in the number of a crop, which crops_per_scene={crops} tells scenes "
            "apart by; leave crops_per_scene out."
        )
    return f"{match[1]} {(int(match[2]) - 1) // crops + 1}"


def choose(filenames: Sequence[str], count: int, crops: int, seed: int) -> list[int]:
    """Choose pairs scene after scene, the last scene in part; scenes stand in an order drawn by the seed.

    Args:
        filenames: Of all pairs.
        count: Pairs to take.
        crops: As in `scene_of`.
        seed: Of the order; each has pairs of its own.

    Returns:
        Positions of the chosen pairs in `filenames`, ascending.

    Raises:
        InputError: `count` is below 1 or above the number of pairs, or a name has no number.
    """
    if not 1 <= count <= len(filenames):
        raise InputError(f"num_train_pairs={count}: there are 1 to {len(filenames)} pairs to choose from.")
    scenes = {name: scene_of(name, crops) for name in filenames}
    place = {scene: random.Random(f"{seed} {scene}").random() for scene in scenes.values()}  # whatever else there is
    order = sorted(range(len(filenames)), key=lambda index: (place[scenes[filenames[index]]], filenames[index]))
    return sorted(order[:count])


def take_scenes(pairs: Any, count: int | None, crops: int, seed: int) -> Any:
    """Some pairs of a data set, scene by scene.

    Args:
        pairs: Of `load_pairs`, all of a split.
        count: As in `choose`.
        crops: Likewise.
        seed: Likewise.

    Returns:
        These pairs, in the order of the data set.

    Raises:
        InputError: As in `choose`; or `crops` is below 1, `count` is None, or there are no names to choose by.
    """
    if crops < 1:
        raise InputError(f"crops_per_scene={crops} must be at least 1 (16 in LEVIR-CC), or be left out.")
    if count is None:
        raise InputError(f"crops_per_scene={crops} says how num_train_pairs are chosen: give both, or neither.")
    if not isinstance(pairs, LevirCCDataset | ShardDataset):
        raise InputError(
            f"crops_per_scene={crops} chooses by the file names of a LEVIR-CC folder or of parquet shards, and this "
            "data is neither: leave it out, or make shards (`kcfi data convert`)."
        )
    chosen = choose(column_of(pairs, "filename"), count, crops, seed)
    if isinstance(pairs, LevirCCDataset):
        return Subset(pairs, chosen)
    pairs.keep(set(chosen))
    return pairs


def column_of(pairs: Any, name: str) -> list[Any]:
    """What every pair of a data set has under one key of the example; images are decoded only where there is no way.

    Args:
        pairs: Map-style data set of examples as in `pairs.py`, maybe in `ReadablePairs`.
        name: "filename", "captions" or "changed".
    """
    if isinstance(pairs, ShardDataset):
        return pairs.column(name)
    if isinstance(pairs, LevirCCDataset):
        return [getattr(pair, name) for pair in pairs.pairs]
    if isinstance(pairs, RowDataset):
        return [pairs.row(index).get(name) for index in range(len(pairs))]
    if isinstance(pairs, ReadablePairs) and isinstance(
        pairs.pairs, ShardDataset | LevirCCDataset | RowDataset | Subset
    ):
        return column_of(pairs.pairs, name)  # without a look at images nothing has to stand in for one
    if isinstance(pairs, Subset):
        values = column_of(pairs.dataset, name)
        return [values[index] for index in pairs.indices]
    return [pairs[index][name] for index in range(len(pairs))]
