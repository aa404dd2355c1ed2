"""What a pair is: the example that every data set yields, what masks mean, and how the files of a pair are read.

| key | value |
|---|---|
| `image_before`, `image_after` | PIL RGB, one size |
| `mask` | PIL "L" holding the file values 0 (background), 128 (road), 255 (building), or None |
| `captions` | list of sentences, empty in a data set of masks alone |
| `changed` | bool, the data set's own flag; where it has none, whether the mask shows a change |
| `filename`, `split` | str |

`class_ids` is the one place that turns file values into the classes a model is trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kcfi.pictures import MASK_BACKGROUND, MASK_BUILDING, MASK_ROAD
from kcfi.processing import NO_LABEL, InputError, refusing
from kcfi.processing.reading_kcfi import EIGHT_BIT_MODES, open_image, read_image

MaskClasses = Literal["change", "building", "road_building"]

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
    if mask.mode not in EIGHT_BIT_MODES:
        raise InputError(f"{filename}: mask of mode {mask.mode}; expected 8-bit grey")
    if mask.mode in ("L", "1"):
        return mask.convert("L")
    with refusing(f"{filename}: cannot be read as a mask"):  # a palette may be broken
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


def read_images(
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
            sources: As in `read_images`.

        Raises:
            FileNotFoundError: If a file is missing.
            UnreadablePairError: If a file is no image, the mask is coloured, or the sizes differ.
            InputError: If neither a flag nor a mask tells whether the pair changed.
        """
        images, problems = read_images(sources)
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
