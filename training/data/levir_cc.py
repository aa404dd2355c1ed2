"""LEVIR-CC and LEVIR-MCI folders as pairs of images with captions and, in LEVIR-MCI, masks; LEVIR-CD has masks alone.

```
ROOT/LevirCCcaptions.json[.gz]              sentences, split and changed flag of every pair
ROOT/images/{split}/{A,B,label}/NAME.png    before, after and mask (LEVIR-CC proper has no `label`)

ROOT/{split}/{A,B,label}/NAME.png           LEVIR-CD, WHU-CD and others: no sentences, a pair is changed if its mask is
```

The example that they yield is described in `pairs.py`. The same pairs as parquet shards are read by `shards.py`, in
any other form that `datasets` opens by `rows.py`; `training/load.py` opens all by name.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers.utils import logging

from kcfi.files import name_some, read_json
from kcfi.processing import InputError
from kcfi.training.data.pairs import CaptionedPair

logger = logging.get_logger(__name__)


# Endings of files that rows of pairs stand in, for `datasets`; .csv and .jsonl may be the metadata of an image folder.
ROW_FILES = (".parquet", ".arrow", ".tar", ".json", ".jsonl", ".csv")

# Names of the captions file, and the folder of each image of an example below `images/{split}`.
CAPTIONS_FILES = ("LevirCCcaptions.json", "LevirCCcaptions.json.gz")
FOLDERS = {"image_before": "A", "image_after": "B", "mask": "label"}


# What LEVIR-CD calls its scenes, and what the tiles of 256 px cut from them are called: test_2.png,
# test_2_0000_0512.png. LEVIR-CC, LEVIR-MCI and drawn pairs have six digits.
_LEVIR_CD_NAME = re.compile(r"(train|val|test)_\d{1,3}(_\d{4}_\d{4})?\.png")


def find_captions(root: Path) -> Path:
    """Find the captions file of a LEVIR-CC or LEVIR-MCI folder.

    Raises:
        FileNotFoundError: If there is no such folder, or no such file in it.
        InputError: If `root` is a file.
    """
    if root.is_file():
        raise InputError(
            f"{root} is a file, no folder. Of an archive (zip, tar) of LEVIR-CC or LEVIR-MCI make shards first, `kcfi "
            "data convert ARCHIVE --output shards`, and give that folder."
        )
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    for name in CAPTIONS_FILES:
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(
        f"{root}: no {' or '.join(CAPTIONS_FILES)} in this folder, and no {{split}}/label as of masks alone"
    )


def read_captions(path: Path, split: str) -> list[CaptionedPair]:
    """Read the pairs of one split from LevirCCcaptions.json; `imgid` and `sentids` are not needed.

    Args:
        path: The JSON file, plain or gzipped (`.gz`).
        split: Value of the field `split`.

    Returns:
        The pairs in the order of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If the file is no such JSON, has no pair of this split, or a pair of any split lacks a field, has
            an empty sentence or occurs twice.
    """
    return _of_split(*read_all_captions(path), split, path)


def _of_split(pairs: list[CaptionedPair], problems: list[str], split: str, source: Path) -> list[CaptionedPair]:
    """The pairs of one split, if none of any split has a problem."""
    if problems:
        raise InputError(problems[0])
    found = sorted({pair.split for pair in pairs})
    if split not in found:
        raise InputError(f"{source}: no pair of split '{split}'; its splits: {', '.join(found) or 'none'}")
    return [pair for pair in pairs if pair.split == split]


def open_folder(root: Path) -> tuple[Path, list[CaptionedPair], list[str]]:
    """Find the pairs of every split: those of the captions file or, where there is none, the files of `{split}/A`.

    Args:
        root: Folder in one of the two layouts of the module's docstring.

    Returns:
        The folder that holds the splits, their pairs, and the problems of the captions file.

    Raises:
        FileNotFoundError: If there is no such folder, or neither a captions file nor a `{split}/label` in it.
        InputError: If the captions file is no such JSON.
    """
    splits = sorted(label.parent for label in root.glob("*/label"))
    if splits and not any((root / name).is_file() for name in CAPTIONS_FILES):
        names = [(path.name, split.name) for split in splits for path in sorted((split / "A").glob("[!.]*"))]
        return root, [CaptionedPair(name, None, [], split) for name, split in names], []
    return root / "images", *read_all_captions(find_captions(root))


def read_all_captions(path: Path) -> tuple[list[CaptionedPair], list[str]]:
    """Read the pairs of every split from LevirCCcaptions.json, and find everything that is wrong with the others.

    Args:
        path: The JSON file, plain or gzipped (`.gz`).

    Returns:
        The pairs in the order of the file, and one line per entry that lacks a field, has an empty sentence, repeats
        the file name of another pair of its split, or has a folder in its file name or split.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If the file is no such JSON.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise InputError(f"{path}: no list 'images'; expected the schema of LevirCCcaptions.json")
    pairs: dict[tuple[str, str], CaptionedPair] = {}
    problems = []
    for number, entry in enumerate(content["images"]):
        try:
            captions = [sentence["raw"].strip() for sentence in entry["sentences"]]
            pair = CaptionedPair(entry["filename"], bool(entry["changeflag"]), captions, entry["split"])
            repeated = (pair.split, pair.filename) in pairs
            is_path = any(Path(name).name != name for name in (pair.split, pair.filename))
        except (KeyError, TypeError, AttributeError) as error:
            problems.append(f"{path}: images[{number}] is not as in LevirCCcaptions.json ({error!r})")
            continue
        if repeated:
            problems.append(f"{path}: {pair.filename} occurs more than once")
        elif is_path:
            problems.append(f"{path}: {pair.filename} in split {pair.split}: expected names without a folder")
        elif "" in captions:
            problems.append(f"{path}: {pair.filename} has an empty sentence")
        else:
            pairs[pair.split, pair.filename] = pair
    return list(pairs.values()), problems


def warn_of_levir_cd(filenames: Iterable[str]) -> None:
    """Warn where pairs to be scored are LEVIR-CD's by their file names.

    What a model was trained on is not known here, so the warning says for which models it holds.
    """
    names = [name for name in filenames if _LEVIR_CD_NAME.fullmatch(Path(name).name)]
    if names:
        logger.warning(
            f"{len(names)} pairs have file names of LEVIR-CD: {name_some(names)}. LEVIR-CC and LEVIR-MCI show the "
            "same places under other names and in other splits: for a model trained on them this is no zero-shot "
            "score."
        )


class LevirCCDataset(Dataset[dict[str, Any]]):
    """One split of a folder in one of the layouts of the module's docstring; yields the example of `pairs.py`.

    The captions are read at construction, the images when an example is asked for.

    Args:
        root: Folder that holds `LevirCCcaptions.json` (or `.json.gz`) and `images`, or splits with masks alone.
        split: "train", "val" or "test", as the JSON or the folder names them.

    Attributes:
        pairs: What the JSON says about each pair, in the order of the examples; by file name where there is none.

    Raises:
        FileNotFoundError: At construction, if a folder or the JSON is missing or a folder is empty; by an example, if
            one of its files is missing.
        InputError: At construction, for a JSON that `read_captions` refuses; by an example, if a file is no image, the
            mask is coloured, or the sizes differ.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        images, pairs, problems = open_folder(Path(root))
        self.pairs = _of_split(pairs, problems, split, Path(root))
        self.folder = images / split
        for folder in (self.folder / "A", self.folder / "B"):
            if not folder.is_dir() or not any(folder.iterdir()):
                raise FileNotFoundError(f"{folder}: missing or empty; expected the images of split '{split}'")
        self.has_masks = (self.folder / "label").is_dir()

    def __len__(self) -> int:
        return len(self.pairs)

    def files(self, index: int) -> dict[str, Path]:
        """The files of a pair by the key of the example; without "mask" if the split has no masks."""
        filename = self.pairs[index].filename
        return {key: self.folder / name / filename for key, name in FOLDERS.items() if key != "mask" or self.has_masks}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.pairs[index].example(self.files(index))


def is_datasets_name(dataset: str) -> bool:
    """Tell whether `datasets` opens this name: a folder with files of rows, or a Hub id where there is no folder."""
    root = Path(dataset)
    if root.is_dir():
        return not any((root / name).is_file() for name in CAPTIONS_FILES) and any(
            path.suffix in ROW_FILES for path in root.rglob("*")
        )
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", dataset) is not None and not root.exists()
