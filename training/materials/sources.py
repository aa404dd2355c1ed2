"""Sources of materials: single-date aerial images with what is known of them (`source.yaml`).

```
SOURCE/source.yaml          description: the fields of `Source`; a few folders need none, `sources/` describes them
SOURCE/images/**/*.png      png, jpg or tif
SOURCE/masks/**/*.png       a mask per image, of the same path but for its ending; png or tif
SOURCE/footprints.geojson   or polygons of buildings: one file, or a folder of one per image
```

A source without labels may instead sort its images into folders of scene classes (`forest/*.jpg`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kcfi.files import check_names, name_some, read_yaml
from kcfi.processing import InputError, refusing
from kcfi.processing.reading_kcfi import read_image
from kcfi.training.synthetic.textures import TextureKind

Split = Literal["train", "val", "test"]
FINEST = 0.25  # m/px, to which finer images are reduced
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
MASK_ENDINGS = (".png", ".tif", ".tiff")  # jpg changes the colours
# What a labelled pixel may show; the position is the value in `Picture.labels`. "open": no building, else unknown.
SURFACES = ("unknown", "open", "land", "vegetation", "water", "road", "building")
LEGEND = SURFACES[2:]
EXAMPLE = """name: My town
licence: CC-BY-4.0
metres_per_pixel: 0.3
images: images
labels: masks
"""


@dataclass(frozen=True)
class Place:
    """An image of a source.

    Attributes:
        image: The file.
        labels: File of its labels, None without.
        region: Region of the source.
        split: By its region.
        scene: Class of scenes, "" in a source that has none.
    """

    image: Path
    labels: Path | None
    region: str
    split: Split
    scene: str = ""


@dataclass(frozen=True)
class Picture:
    """The content of an image of a source.

    Attributes:
        image: RGB.
        labels: (H, W), positions in `SURFACES`; None without labels.
        pixel: Width and height of a pixel in m.
    """

    image: Image.Image
    labels: NDArray[np.uint8] | None
    pixel: tuple[float, float]

    def resampled(self, metres: float) -> "Picture":
        """The picture at square pixels of so many m."""
        width, height = (
            max(round(side * size / metres), 1) for side, size in zip(self.image.size, self.pixel, strict=True)
        )
        labels = self.labels
        if labels is not None:
            labels = np.array(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
        return Picture(self.image.resize((width, height), Image.Resampling.LANCZOS), labels, (metres, metres))


@dataclass(frozen=True)
class Source:
    """A folder of single-date images and its description.

    Attributes:
        root: The folder.
        name: Of the source, as it should be credited.
        licence: Of the images and labels.
        metres_per_pixel: None: read from each GeoTIFF.
        images: Folder of the images below `root`.
        labels: Folder of masks or of GeoJSON files, or one GeoJSON file, below `root`; "": no labels.
        legend: RGB colours of the masks for the names of `LEGEND`; pixels of other colours are unknown. Empty: what is
            not black is building.
        regions: Regular expression whose first group finds the region in an image's path below `root`. "": the whole
            source is one region, "all".
        val, test: Regions that are held out; all others are "train".
        classes: Folders of scene classes below `root`, which stand instead of `images` and `labels`, and the kinds of
            texture to cut from each ([]: its images are only shown whole).
    """

    root: Path
    name: str
    licence: str
    metres_per_pixel: float | None = None
    images: str = "images"
    labels: str = ""
    legend: Mapping[str, Sequence[int]] = field(default_factory=dict)
    regions: str = ""
    val: Sequence[str] = ()
    test: Sequence[str] = ()
    classes: Mapping[str, Sequence[TextureKind]] = field(default_factory=dict)

    def places(self) -> list[Place]:
        """Find the images, in the order of their paths.

        Raises:
            FileNotFoundError: If a folder, all images or a label file is missing.
            ValueError: If an image has no region, or a region that is held out has no image.
        """
        found = []
        for folder in self.classes or [self.images]:
            if not (self.root / folder).is_dir():
                raise FileNotFoundError(
                    f"{self.root / folder}: no such folder, but the description of the source says so"
                )
            for path in sorted((self.root / folder).rglob("*")):
                if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith("."):
                    region = self._region(path)
                    split: Split = "val" if region in self.val else "test" if region in self.test else "train"
                    scene = folder if self.classes else ""
                    found.append(Place(path, self._find_labels(path), region, split, scene))
        if not found:
            folders = name_some(self.classes or [self.images])
            raise FileNotFoundError(f"{self.root}: no image ({', '.join(IMAGE_ENDINGS)}) in {folders}")
        regions = {place.region for place in found}
        for region in (*self.val, *self.test):
            if region not in regions:
                raise InputError(
                    f"{self.root}: no image is in region '{region}', which the description holds out; "
                    f"regions: {', '.join(sorted(regions))}"
                )
        return found

    def _region(self, path: Path) -> str:
        """The region of an image; see `regions`."""
        if not self.regions:
            return "all"
        below = path.relative_to(self.root).as_posix()
        match = re.search(self.regions, below)
        if match is None or not match.groups() or not match[1]:
            raise InputError(f"{self.root}: regions '{self.regions}' finds no group in the path '{below}'")
        return match[1]

    def _find_labels(self, image: Path) -> Path | None:
        """The file of labels of an image."""
        if not self.labels:
            return None
        labels = self.root / self.labels
        if labels.suffix == ".geojson" and labels.is_file():
            return labels
        if not labels.is_dir():
            raise FileNotFoundError(f"{labels}: no such file or folder, but the description of the source says so")
        stem = labels / image.relative_to(self.root / self.images).with_suffix("")
        for ending in (*MASK_ENDINGS, ".geojson"):
            path = stem.with_name(stem.name + ending)
            if path.is_file():
                return path
        raise FileNotFoundError(f"{image}: no labels; expected {stem} with {', '.join((*MASK_ENDINGS, '.geojson'))}")

    def read_mask(self, path: Path, size: tuple[int, int], image: Path) -> NDArray[np.uint8]:
        """Read a mask.

        Args:
            path: The mask.
            size: Width and height of the image.
            image: File of the image, for errors.

        Returns:
            (H, W), positions in `SURFACES`.

        Raises:
            ValueError: If the file cannot be read or has another size.
        """
        mask = read_image(path)
        if mask.size != size:
            raise InputError(f"{path}: {mask.width} x {mask.height} px, but {image} has {size[0]} x {size[1]}")
        pixels = np.asarray(mask)
        if not self.legend:
            return np.where(pixels.any(-1), SURFACES.index("building"), SURFACES.index("open")).astype(np.uint8)
        codes = pixels @ np.array([1 << 16, 1 << 8, 1])
        labels = np.zeros(codes.shape, np.uint8)
        for surface, (red, green, blue) in self.legend.items():
            labels[codes == (red << 16) + (green << 8) + blue] = SURFACES.index(surface)
        return labels


def read_source(root: Path, kinds: Sequence[TextureKind]) -> Source:
    """Read the description of a source: `source.yaml` in its folder, or the packaged one of a folder of that name.

    Args:
        root: Folder of the source.
        kinds: Kinds of texture that `classes` may ask for.

    Raises:
        FileNotFoundError: If there is no such folder, or no description.
        InputError: If the description is refused.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    file: Any = root / "source.yaml"
    if not file.is_file():
        file = resources.files("kcfi.training") / "sources" / f"{root.resolve().name}.yaml"
    if not file.is_file():
        lines = ", ".join(EXAMPLE.splitlines())
        raise FileNotFoundError(
            f"{root / 'source.yaml'} does not exist: describe the source there, for example: {lines}"
        )
    values = read_yaml(file)
    try:
        with refusing("not as it should be"):
            return _checked(root, values, kinds)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _checked(root: Path, values: Any, kinds: Sequence[TextureKind]) -> Source:
    """A source by the values of its description."""
    known = [entry.name for entry in fields(Source) if entry.name != "root"]
    check_names(values, known, "entry")
    for name in ("name", "licence"):
        if not isinstance(values.get(name), str):
            raise InputError(f"{name} is missing: it is needed to credit the source")
    for name in ("images", "labels", "regions"):
        if not isinstance(values.get(name, ""), str):
            raise InputError(f"{name} is {values[name]!r}; expected a text")
    metres = values.get("metres_per_pixel")
    if metres is not None and not (isinstance(metres, int | float) and metres > 0):
        raise InputError(f"metres_per_pixel is {metres!r}; expected a number above 0")
    for name in ("val", "test"):
        if not isinstance(values.get(name, []), list):
            raise InputError(f'{name} is {values[name]!r}; expected a list of regions, for example ["{values[name]}"]')
        values[name] = [str(region) for region in values.get(name, [])]
    twice = set(values["val"]) & set(values["test"])
    if twice:
        raise InputError(f"region '{min(twice)}' is in val and in test")
    for name in ("legend", "classes"):
        if not isinstance(values.setdefault(name, {}), dict):
            raise InputError(f"{name} is {values[name]!r}; expected a table")
    check_names(values["legend"], LEGEND, "surface in legend")
    for surface, colour in values["legend"].items():
        if not (isinstance(colour, list) and len(colour) == 3 and all(value in range(256) for value in colour)):
            raise InputError(f"legend: {surface} is {colour!r}; expected a colour, for example [255, 0, 0]")
    for scene, textures in values["classes"].items():
        if not isinstance(scene, str) or not isinstance(textures, list):
            raise InputError(
                f"classes: {scene} is {textures!r}; expected a list of kinds of texture, for example [woods]"
            )
        check_names(textures, kinds, f"kind of texture of {scene}")
    if values["classes"] and ("images" in values or "labels" in values):
        raise InputError("classes stand instead of images and labels: leave one of them out")
    try:
        re.compile(values.get("regions", ""))
    except re.error as error:
        raise InputError(f"regions is no regular expression ({error})") from error
    return Source(root, **values)
