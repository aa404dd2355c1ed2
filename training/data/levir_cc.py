"""LEVIR-CC and LEVIR-MCI folders as pairs of images with captions and, in LEVIR-MCI, masks; LEVIR-CD has masks alone.

```
ROOT/LevirCCcaptions.json[.gz]              sentences, split and changed flag of every pair
ROOT/images/{split}/{A,B,label}/NAME.png    before, after and mask (LEVIR-CC proper has no `label`)

ROOT/{split}/{A,B,label}/NAME.png           LEVIR-CD, WHU-CD and others: no sentences, a pair is changed if its mask is
```

Every data set of this project yields the same example, a dictionary:

| key | value |
|---|---|
| `image_before`, `image_after` | PIL RGB, one size |
| `mask` | PIL "L" holding the file values 0 (background), 128 (road), 255 (building), or None |
| `captions` | list of sentences, empty in a data set of masks alone |
| `changed` | bool, the data set's own flag; where it has none, whether the mask shows a change |
| `filename`, `split` | str |

`class_ids` is the one place that turns file values into the classes a model is trained on. The same pairs as parquet
shards are read by `shards.py`, in any other form that `datasets` opens by `rows.py`; `load_pairs` opens all by name.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset, Subset
from transformers.utils import logging

from kcfi.processing import InputError
from kcfi.processing.reading_kcfi import open_image, read_image

logger = logging.get_logger(__name__)

MaskClasses = Literal["change", "building", "road_building"]

# What the grey values of a mask file mean. LEVIR-CD masks use the first and the last only.
MASK_BACKGROUND = 0
MASK_ROAD = 128
MASK_BUILDING = 255

# Class id, after mapping, of a pixel without a label (the border that a crop leaves, a pair without a mask).
NO_LABEL = 255

# Class names in the order of their ids.
CLASS_NAMES: dict[MaskClasses, tuple[str, ...]] = {
    "change": ("background", "change"),
    "building": ("background", "building"),
    "road_building": ("background", "road", "building"),
}
_CLASS_IDS: dict[MaskClasses, dict[int, int]] = {
    "change": {MASK_BACKGROUND: 0, MASK_ROAD: 1, MASK_BUILDING: 1},
    "building": {MASK_BACKGROUND: 0, MASK_ROAD: 0, MASK_BUILDING: 1},
    "road_building": {MASK_BACKGROUND: 0, MASK_ROAD: 1, MASK_BUILDING: 2},
}

# Endings of files that rows of pairs stand in, for `datasets`; .csv and .jsonl may be the metadata of an image folder.
ROW_FILES = (".parquet", ".arrow", ".tar", ".json", ".jsonl", ".csv")

# Names of the captions file, and the folder of each image of an example below `images/{split}`.
CAPTIONS_FILES = ("LevirCCcaptions.json", "LevirCCcaptions.json.gz")
FOLDERS = {"image_before": "A", "image_after": "B", "mask": "label"}

# Pairs that "synthetic" draws when nobody says how many; 500 is the size of the embedded model's test.
SYNTHETIC_PAIRS = {"train": 5000, "val": 500, "test": 500}

# What LEVIR-CD calls its scenes, and what the tiles of 256 px cut from them are called: test_2.png,
# test_2_0000_0512.png. LEVIR-CC, LEVIR-MCI and drawn pairs have six digits.
_LEVIR_CD_NAME = re.compile(r"(train|val|test)_\d{1,3}(_\d{4}_\d{4})?\.png")

# Modes that become 8-bit RGB without clipping; 16-bit and float images would turn white.
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def num_classes(mask_classes: MaskClasses) -> int:
    """Count the classes of a mapped mask, the background included."""
    return len(CLASS_NAMES[mask_classes])


def class_ids(mask: Image.Image, mask_classes: MaskClasses, filename: str) -> NDArray[np.uint8]:
    """Turn the file values of a mask into class ids.

    Args:
        mask: Mask as its file holds it: grey, or three equal channels.
        mask_classes: "change" (road or building -> 1), "building" (building -> 1, road -> 0) or "road_building"
            (road -> 1, building -> 2).
        filename: Name that errors show.

    Returns:
        Class ids (H, W), uint8. File value 255 is a building; `NO_LABEL` never comes from a file.

    Raises:
        InputError: If the channels differ or a value is none of 0, 128 and 255.
    """
    table = np.full(256, NO_LABEL, np.uint8)
    for value, class_id in _CLASS_IDS[mask_classes].items():
        table[value] = class_id
    values = np.asarray(grey_mask(mask, filename))
    ids: NDArray[np.uint8] = table[values]
    unknown = np.unique(values[ids == NO_LABEL])
    if unknown.size:
        raise InputError(
            f"{filename}: mask value {', '.join(map(str, unknown))} is unknown; expected {MASK_BACKGROUND} "
            f"(background), {MASK_ROAD} (road) and {MASK_BUILDING} (building)"
        )
    return ids


def grey_mask(mask: Image.Image, filename: str) -> Image.Image:
    """Reduce a mask to one channel of file values.

    Args:
        mask: Grey, black-and-white, palette or colour image; a colour image must have three equal channels.
        filename: Name that errors show.

    Returns:
        Image of mode "L".

    Raises:
        InputError: If the channels differ or the image has more than 8 bits per channel.
    """
    if mask.mode not in _EIGHT_BIT_MODES:
        raise InputError(f"{filename}: mask of mode {mask.mode}; expected 8-bit grey")
    if mask.mode in ("L", "1"):
        return mask.convert("L")
    channels = np.asarray(mask.convert("RGB"))
    if (channels != channels[..., :1]).any():
        raise InputError(f"{filename}: a colour mask; expected grey as in `label` (not `label_rgb`)")
    return Image.fromarray(channels[..., 0])


def read_mask(path: Path | Image.Image) -> Image.Image:
    """Read a mask in the geometry of `read_image`.

    Args:
        path: File of values 0, 128 and 255 in one channel or three equal ones, or a PIL image of such a file.

    Returns:
        Image of mode "L" holding the file values.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If the file is no readable image or no grey mask.
    """
    return grey_mask(open_image(path), str(getattr(path, "filename", path)))


def read_pair(
    sources: Mapping[str, Path | Image.Image],
) -> tuple[dict[str, Image.Image], list[FileNotFoundError | InputError]]:
    """Read the images of a pair and its mask, and find everything that is wrong with them.

    Args:
        sources: Files, or images that PIL opened, by the key of the example; without "mask" if there is none.

    Returns:
        What could be read, by key, and the problems: a file is missing, unreadable, no grey mask, or not as large as
        the first one that could be read. Each names its file.
    """
    images: dict[str, Image.Image] = {}
    problems: list[FileNotFoundError | InputError] = []
    names = {key: str(getattr(source, "filename", source)) for key, source in sources.items()}
    for key, source in sources.items():
        try:
            images[key] = read_mask(source) if key == "mask" else read_image(source)
        except (FileNotFoundError, InputError) as error:
            problems.append(error)
            continue
        first = next(iter(images))
        if images[key].size != images[first].size:
            width, height = images[first].size
            problems.append(
                InputError(
                    f"{names[key]}: {images[key].width} x {images[key].height} pixels, "
                    f"but {names[first]} has {width} x {height}"
                )
            )
    return images, problems


class UnreadablePairError(InputError):
    """An image of a pair cannot be read or does not fit the others; the message names its file."""


@dataclass(frozen=True)
class CaptionedPair:
    """What LevirCCcaptions.json, or a data set without it, says about one pair.

    Attributes:
        filename: Name of both images and of the mask, without a folder.
        changed: The `changeflag`; None where the data set has no flag and the mask tells.
        captions: The raw sentences, stripped; none where it has masks alone.
        split: "train", "val" or "test".
    """

    filename: str
    changed: bool | None
    captions: list[str]
    split: str

    def example(self, sources: Mapping[str, Path | Image.Image]) -> dict[str, Any]:
        """Read the images of the pair: the example of the module's docstring.

        Args:
            sources: As in `read_pair`.

        Raises:
            FileNotFoundError: If a file is missing.
            UnreadablePairError: If a file is no image, the mask is coloured, or the sizes differ.
            InputError: If neither a flag nor a mask tells whether the pair changed.
        """
        images, problems = read_pair(sources)
        for problem in problems:
            raise problem if isinstance(problem, FileNotFoundError) else UnreadablePairError(str(problem)) from problem
        if self.changed is None and "mask" not in images:
            raise InputError(f"{self.filename}: neither a flag nor a mask tells whether it changed")
        return {
            "image_before": images["image_before"],
            "image_after": images["image_after"],
            "mask": images.get("mask"),
            "captions": list(self.captions),
            "changed": images["mask"].getbbox() is not None if self.changed is None else self.changed,
            "filename": self.filename,
            "split": self.split,
        }


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


def read_json(path: Path) -> Any:
    """Read a JSON file, plain or gzipped (`.gz`), refusing keys that occur twice in one object.

    Args:
        path: The file, in UTF-8.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no JSON or an object repeats a key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = path.read_bytes()
        text = gzip.decompress(content) if path.suffix == ".gz" else content
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; plain `dict` would keep the last of two equal keys and say nothing."""
    counts = Counter(key for key, _ in items)
    if len(counts) < len(items):
        raise InputError(f"{name_some(key for key in counts if counts[key] > 1)} occurs more than once")
    return dict(items)


def name_some(names: Iterable[str], limit: int = 5) -> str:
    """Join names for an error message, at most `limit` of them and the count of the rest."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + rest


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
    """One split of a folder in one of the layouts of the module's docstring; yields the example described there.

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


def check_new_folder(folder: Path) -> None:
    """Refuse to write a data set over anything.

    Raises:
        FileExistsError: If the path is a file or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose a new one")


def move_into_place(folder: Path, output: Path) -> None:
    """Give a folder that is complete its name: `output`, new or empty (onto which Windows renames nothing)."""
    if output.exists():
        output.rmdir()
    folder.rename(output)


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
        Data set of examples as in the module's docstring, map-style unless `streaming`.

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
        from kcfi.training.synthetic.library import LibraryMaterials
        from kcfi.training.synthetic.dataset import SyntheticDataset  # a folder needs none of its drawing code

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
