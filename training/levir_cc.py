"""LEVIR-CC and LEVIR-MCI folders as pairs of images with captions and, in LEVIR-MCI, masks.

```
ROOT/LevirCCcaptions.json[.gz]              sentences, split and changed flag of every pair
ROOT/images/{split}/{A,B,label}/NAME.png    before, after and mask (LEVIR-CC proper has no `label`)
```

Every data set of this project yields the same example, a dictionary:

| key | value |
|---|---|
| `image_before`, `image_after` | PIL RGB, one size |
| `mask` | PIL "L" holding the file values 0 (background), 128 (road), 255 (building), or None |
| `captions` | list of sentences |
| `changed` | bool, the data set's own flag |
| `filename`, `split` | str |

`class_ids` is the one place that turns file values into the classes a model is trained on.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset, Subset
from transformers.image_transforms import convert_to_rgb

from kcfi.processing.image_processing_kcfi import eight_bit, open_image

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

# The five sentences that every unchanged pair of LEVIR-CC carries, and no changed one.
UNCHANGED_SENTENCES = (
    "there is no difference",
    "the two scenes seem identical",
    "the scene is the same as before",
    "no change has occurred",
    "almost nothing has changed",
)

# Pairs that "synthetic" draws when nobody says how many; 500 is the size of the embedded model's test.
SYNTHETIC_PAIRS = {"train": 5000, "val": 500, "test": 500}

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
        ValueError: If the channels differ or a value is none of 0, 128 and 255.
    """
    table = np.full(256, NO_LABEL, np.uint8)
    for value, class_id in _CLASS_IDS[mask_classes].items():
        table[value] = class_id
    values = np.asarray(grey_mask(mask, filename))
    ids: NDArray[np.uint8] = table[values]
    unknown = np.unique(values[ids == NO_LABEL])
    if unknown.size:
        raise ValueError(
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
        ValueError: If the channels differ or the image has more than 8 bits per channel.
    """
    if mask.mode not in _EIGHT_BIT_MODES:
        raise ValueError(f"{filename}: mask of mode {mask.mode}; expected 8-bit grey")
    if mask.mode in ("L", "1"):
        return mask.convert("L")
    channels = np.asarray(mask.convert("RGB"))
    if (channels != channels[..., :1]).any():
        raise ValueError(f"{filename}: a colour mask; expected grey as in `label` (not `label_rgb`)")
    return Image.fromarray(channels[..., 0])


def read_image(path: str | Path | Image.Image) -> Image.Image:
    """Read an image as inference sees it: upright, 8-bit RGB, transparency over white.

    Args:
        path: File in any format that PIL reads, or a PIL image.

    Returns:
        Image of mode "RGB", fully loaded.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no readable image or has more than 8 bits per channel.
    """
    image = eight_bit(open_image(path))
    if not isinstance(image, Image.Image):  # mode F
        image = Image.fromarray(image)
    return Image.fromarray(np.asarray(convert_to_rgb(image, return_numpy=True)))


def read_mask(path: Path) -> Image.Image:
    """Read a mask in the geometry of `read_image`.

    Args:
        path: File of values 0, 128 and 255 in one channel or three equal ones.

    Returns:
        Image of mode "L" holding the file values.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no readable image or no grey mask.
    """
    return grey_mask(open_image(path), str(path))


@dataclass(frozen=True)
class CaptionedPair:
    """What LevirCCcaptions.json says about one pair.

    Attributes:
        filename: Name of both images and of the mask, without a folder.
        changed: The `changeflag`.
        captions: The raw sentences, stripped; at least one.
    """

    filename: str
    changed: bool
    captions: list[str]


def read_captions(path: Path, split: str) -> list[CaptionedPair]:
    """Read the pairs of one split from LevirCCcaptions.json; `imgid` and `sentids` are not needed.

    Args:
        path: The JSON file, plain or gzipped (`.gz`).
        split: Value of the field `split`.

    Returns:
        The pairs in the order of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no such JSON, has no pair of this split, or a pair lacks a field, lacks sentences
            or occurs twice.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(f"{path}: no list 'images'; expected the schema of LevirCCcaptions.json")
    pairs = []
    for number, entry in enumerate(content["images"]):
        try:
            if entry["split"] != split:
                continue
            captions = [sentence["raw"].strip() for sentence in entry["sentences"]]
            pairs.append(CaptionedPair(entry["filename"], bool(entry["changeflag"]), captions))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: images[{number}] is not as in LevirCCcaptions.json ({error!r})") from error
        if not captions or "" in captions:
            raise ValueError(f"{path}: {entry['filename']} has no sentence, or an empty one")
    if not pairs:
        found = ", ".join(sorted({str(entry["split"]) for entry in content["images"]})) or "none"
        raise ValueError(f"{path}: no pair of split '{split}'; splits in the file: {found}")
    counts = Counter(pair.filename for pair in pairs)
    if len(counts) < len(pairs):
        raise ValueError(f"{path}: {name_some(name for name in counts if counts[name] > 1)} occurs more than once")
    return pairs


def read_json(path: Path) -> Any:
    """Read a JSON file, plain or gzipped (`.gz`), refusing keys that occur twice in one object.

    Args:
        path: The file, in UTF-8.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON or an object repeats a key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = path.read_bytes()
        text = gzip.decompress(content) if path.suffix == ".gz" else content
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; plain `dict` would keep the last of two equal keys and say nothing."""
    counts = Counter(key for key, _ in items)
    if len(counts) < len(items):
        raise ValueError(f"{name_some(key for key in counts if counts[key] > 1)} occurs more than once")
    return dict(items)


def name_some(names: Iterable[str], limit: int = 5) -> str:
    """Join names for an error message, at most `limit` of them and the count of the rest."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + rest


class LevirCCDataset(Dataset[dict[str, Any]]):
    """One split of a LEVIR-CC or LEVIR-MCI folder; yields the example of the module's docstring.

    The captions are read at construction, the images when an example is asked for.

    Args:
        root: Folder that holds `LevirCCcaptions.json` (or `.json.gz`) and `images`.
        split: "train", "val" or "test", as the JSON names them.

    Attributes:
        pairs: What the JSON says about each pair, in the order of the examples.

    Raises:
        FileNotFoundError: At construction, if a folder or the JSON is missing or a folder is empty; by an example, if
            one of its files is missing.
        ValueError: At construction, for a JSON that `read_captions` refuses; by an example, if a file is no image, the
            mask is coloured, or the sizes differ.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder")
        plain, gzipped = root / "LevirCCcaptions.json", root / "LevirCCcaptions.json.gz"
        captions = plain if plain.is_file() else gzipped
        if not captions.is_file():
            raise FileNotFoundError(f"{root}: no LevirCCcaptions.json or LevirCCcaptions.json.gz in this folder")
        self.pairs = read_captions(captions, split)
        self.split = split
        self.folder = root / "images" / split
        for folder in (self.folder / "A", self.folder / "B"):
            if not folder.is_dir() or not any(folder.iterdir()):
                raise FileNotFoundError(f"{folder}: missing or empty; expected the images of split '{split}'")
        self.has_masks = (self.folder / "label").is_dir()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        before = read_image(self.folder / "A" / pair.filename)
        after = read_image(self.folder / "B" / pair.filename)
        mask = read_mask(self.folder / "label" / pair.filename) if self.has_masks else None
        for name, other in (("B", after), ("label", mask)):
            if other is not None and other.size != before.size:
                raise ValueError(
                    f"{self.folder / name / pair.filename}: {other.width} x {other.height} pixels, "
                    f"but its partner in A has {before.width} x {before.height}"
                )
        return {
            "image_before": before,
            "image_after": after,
            "mask": mask,
            "captions": list(pair.captions),
            "changed": pair.changed,
            "filename": pair.filename,
            "split": self.split,
        }


def load_pairs(dataset: str, split: str, num_pairs: int | None = None, seed: int = 0) -> Dataset[dict[str, Any]]:
    """Open a data set by the name that recipes and commands use.

    Args:
        dataset: "synthetic", or a folder in the layout of LEVIR-CC or LEVIR-MCI.
        split: "train", "val" or "test".
        num_pairs: Pairs that "synthetic" draws (None: `SYNTHETIC_PAIRS`), or how many of a folder's first pairs to
            take at most (None: all).
        seed: Seed of "synthetic"; a folder has none.

    Returns:
        Map-style data set of examples as in the module's docstring.

    Raises:
        FileNotFoundError: If the folder or a part of it is missing.
        ValueError: If `num_pairs` is below 1, the split is unknown, or the folder's JSON is refused.
    """
    if num_pairs is not None and num_pairs < 1:
        raise ValueError(f"num_pairs is {num_pairs}; expected at least 1")
    if dataset == "synthetic":
        from kcfi.training.synthetic import SyntheticDataset  # a folder needs none of its drawing code

        if split not in SYNTHETIC_PAIRS:
            raise ValueError(f"split '{split}' is unknown; 'synthetic' has {', '.join(SYNTHETIC_PAIRS)}")
        return SyntheticDataset(num_pairs or SYNTHETIC_PAIRS[split], split=split, seed=seed)
    pairs = LevirCCDataset(dataset, split)
    return pairs if num_pairs is None else Subset(pairs, range(min(num_pairs, len(pairs))))
