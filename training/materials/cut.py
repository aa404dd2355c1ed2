"""The library of materials (`kcfi data materials`): real surfaces, roofs and places at 0.5 m/px, from single dates.

```
LIBRARY/materials.json       sources, and an entry per image (`Material` in synthetic/material_library.py)
LIBRARY/textures/*.jpg       one surface each, at least 48 px on a side
LIBRARY/roofs/*.png          RGBA; rectified: the sides of the roof are parallel to those of the image
LIBRARY/tiles/*.jpg          whole places
LIBRARY/labels/*.png         what the pixels of a tile show, in the values of `LABEL_VALUES`
LIBRARY/contact_sheet.png    samples to look at
```
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import ConvexHull
from tqdm import tqdm

from kcfi.files import check_new_folder, move_into_place
from kcfi.pictures import MASK_BUILDING, MASK_ROAD, contact_sheet, overlay
from kcfi.processing import InputError
from kcfi.processing.reading_kcfi import read_image
from kcfi.training.materials.sources import FINEST, SURFACES, Picture, Place, Source, read_source
from kcfi.training.synthetic.material_library import KEEP_OFF, LAND, OPEN, VILLA_AREA, Material
from kcfi.training.synthetic.textures import Array, TextureKind

MaterialKind = TextureKind | Literal["tile"]
METRES_PER_PIXEL = 0.5  # of everything in a library: that of LEVIR-CC and of the drawn scenes

# By the positions in SURFACES: unknown, open, land, vegetation, water, road, building
LABEL_VALUES = np.array([KEEP_OFF, OPEN, LAND, LAND, KEEP_OFF, MASK_ROAD, MASK_BUILDING], np.uint8)
MIN_TILE, MAX_TILE = 64, 768  # px; smaller places are left out, larger ones cut into equal parts
USEFUL_SHARE = 0.1  # of the pixels of a labelled tile that must be land, road or building

BLOCK = 8  # px, side of the blocks that textures are looked at in
WINDOW = 6  # blocks (48 px), side of a texture that is cut out of other surfaces
WINDOWS_PER_PLACE = 3  # of each kind, the most even ones
TEXTURES_PER_KIND, ROOFS_PER_KIND = 150, 400  # kept of each source, kind and split

LARGEST_AREA = 8000  # px (2,000 m2): above, a label often covers several buildings
SIDES = (12, 180)  # px, range of the sides of a roof
MIN_FILL = 0.8  # share of its rectangle that a roof must cover
PATCHY = 34  # grey levels, deviation of brightness (smoothed by 2 px) above which it is not one roof

SHEET_SAMPLES = 8  # per source and kind
SHEET_TILE = 144  # px


@dataclass(frozen=True)
class TextureLimits:
    """What a texture of a kind must look like, in grey levels.

    Attributes:
        unevenness: How far a block's mean colour may be from the texture's: no two surfaces, no edge, no car.
        grain: Largest deviation of the pixels within the blocks.
        green: Range of green above the mean of red and blue.
        blue: Range of blue above red.
        light: Range of brightness.
    """

    unevenness: float
    grain: float
    green: tuple[float, float] = (-255, 255)
    blue: tuple[float, float] = (-255, 255)
    light: tuple[float, float] = (25, 235)


LIMITS: dict[TextureKind, TextureLimits] = {
    "grass": TextureLimits(18, 12, green=(4, 255), blue=(-255, 0), light=(40, 180)),
    "field": TextureLimits(40, 30, green=(-12, 12), blue=(-255, 4), light=(50, 215)),
    "soil": TextureLimits(16, 10, green=(-12, 4), blue=(-255, 4), light=(110, 235)),
    "woods": TextureLimits(70, 45, green=(0, 255), light=(35, 120)),
    "water": TextureLimits(14, 8, green=(0, 60), light=(30, 150)),
    "asphalt": TextureLimits(24, 13, green=(-8, 3), blue=(-10, 16), light=(50, 190)),
    "parking": TextureLimits(255, 255),
}
# Textures that may be cut where all pixels are labelled as one surface
TEXTURES_OF: dict[str, tuple[TextureKind, ...]] = {
    "land": ("soil", "grass"),
    "vegetation": ("grass",),
    "water": ("water",),
    "road": ("asphalt",),
}


def _blocks(pixels: NDArray[Any]) -> NDArray[Any]:
    """Cut an image (H, W, C) into blocks: (H // BLOCK, W // BLOCK, C, pixels of a block)."""
    rows, columns = pixels.shape[0] // BLOCK, pixels.shape[1] // BLOCK
    cut = pixels[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK, -1)
    return cut.transpose(0, 2, 4, 1, 3).reshape(rows, columns, -1, BLOCK * BLOCK)


def cut_windows(
    image: Image.Image, size: tuple[int, int], kinds: Mapping[TextureKind, NDArray[np.bool_] | bool]
) -> Iterator[tuple[TextureKind, Image.Image]]:
    """Cut the most even windows that look like their kind of texture, `WINDOWS_PER_PLACE` of each, without overlap.

    Args:
        image: At 0.5 m/px.
        size: Rows and columns of a window in blocks.
        kinds: Kinds of texture, and where one may be cut, by the block in the upper left corner of the window.

    Yields:
        Kind and texture.
    """
    blocks = _blocks(np.asarray(image, np.float32))
    if blocks.shape[0] < size[0] or blocks.shape[1] < size[1]:
        return
    means = sliding_window_view(blocks.mean(-1), size, (0, 1))  # (rows, columns, 3, *size)
    grain = np.sqrt(sliding_window_view(blocks.var(-1).mean(-1), size).mean((-1, -2)))
    colour = means.mean((-1, -2))
    unevenness = np.abs(means - colour[..., None, None]).max((-1, -2, -3))
    red, green, blue = np.moveaxis(colour, -1, 0)
    free = np.ones(grain.shape, np.bool_)
    for kind, allowed in kinds.items():
        limits = LIMITS[kind]
        fits = allowed & (unevenness <= limits.unevenness) & (grain <= limits.grain)
        fits &= _within(green - (red + blue) / 2, limits.green) & _within(blue - red, limits.blue)
        fits &= _within(colour.mean(-1), limits.light)
        for _ in range(WINDOWS_PER_PLACE):
            best = np.where(fits & free, unevenness, np.inf)
            row, column = (int(i) for i in np.unravel_index(best.argmin(), best.shape))
            if not np.isfinite(best[row, column]):
                break
            top, left = max(row - size[0] + 1, 0), max(column - size[1] + 1, 0)
            free[top : row + size[0], left : column + size[1]] = False
            x, y = column * BLOCK, row * BLOCK
            yield kind, image.crop((x, y, x + size[1] * BLOCK, y + size[0] * BLOCK))


def _within(values: Array, limits: tuple[float, float]) -> NDArray[np.bool_]:
    """Where values are in a range."""
    return (values >= limits[0]) & (values <= limits[1])


def cut_scene_textures(image: Image.Image, kinds: Sequence[TextureKind]) -> Iterator[tuple[TextureKind, Image.Image]]:
    """Cut textures from a scene of one class: the whole of it if it looks like one surface, else windows.

    Args:
        image: At 0.5 m/px.
        kinds: Textures of the class.

    Yields:
        Kind and texture.
    """
    whole = image.height // BLOCK, image.width // BLOCK
    for size in (whole, (WINDOW, WINDOW)):
        textures = list(cut_windows(image, size, dict.fromkeys(kinds, True)))
        if textures:
            yield from textures
            return


def cut_labelled_textures(image: Image.Image, labels: NDArray[np.uint8]) -> Iterator[tuple[TextureKind, Image.Image]]:
    """Cut textures where all pixels are labelled as one surface.

    Args:
        image: At 0.5 m/px.
        labels: (H, W), positions in `SURFACES`.

    Yields:
        Kind and texture.
    """
    if min(labels.shape) < WINDOW * BLOCK:
        return
    size = WINDOW, WINDOW
    blocks = _blocks(labels[..., None])[:, :, 0]
    lowest = sliding_window_view(blocks.min(-1), size).min((-1, -2))
    highest = sliding_window_view(blocks.max(-1), size).max((-1, -2))
    pure = np.where(lowest == highest, lowest, SURFACES.index("unknown"))
    kinds: dict[TextureKind, NDArray[np.bool_]] = {}
    for surface, textures in TEXTURES_OF.items():
        for kind in textures:
            kinds[kind] = kinds.get(kind, False) | (pure == SURFACES.index(surface))
    yield from cut_windows(image, size, kinds)


def smallest_rectangle(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """The rectangle of least area around points; one of its sides lies along their convex hull.

    Args:
        points: (N, 2), x and y; not all on one line.

    Returns:
        Centre (2,), width and height (2,), and the angle of the width to the x axis, -45 to 45 degrees, in radians.
    """
    hull = points[ConvexHull(points).vertices]
    edges = np.roll(hull, -1, 0) - hull
    angles = (np.arctan2(edges[:, 1], edges[:, 0]) + np.pi / 4) % (np.pi / 2) - np.pi / 4
    cos, sin = np.cos(angles), np.sin(angles)
    axes = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], 1)  # (edges, axis, xy)
    along = np.einsum("eax,px->epa", axes, hull)
    low, high = along.min(1), along.max(1)
    best = int((high - low).prod(-1).argmin())
    return (low[best] + high[best]) / 2 @ axes[best], high[best] - low[best], float(angles[best])


def cut_roofs(picture: Picture) -> Iterator[tuple[TextureKind, Image.Image]]:
    """Cut the roofs of the labelled buildings, turned so that their sides are parallel to the image's.

    What touches the border is cut off; what is too large, no rectangle or patchy is often several buildings under one
    label, or the walls of a tower. They are left out.

    Args:
        picture: With labels.

    Yields:
        "villa roof" or "large roof", and an RGBA image at 0.5 m/px whose alpha is the building.
    """
    assert picture.labels is not None
    scale = np.array(picture.pixel) / METRES_PER_PIXEL  # library px per image px
    numbers, _ = ndimage.label(picture.labels == SURFACES.index("building"))
    for number, (rows, columns) in enumerate(ndimage.find_objects(numbers), 1):
        building = numbers[rows, columns] == number
        area = float(building.sum() * scale.prod())
        inside = min(rows.start, columns.start) > 0 and rows.stop < len(numbers) and columns.stop < numbers.shape[1]
        if inside and SIDES[0] ** 2 * MIN_FILL <= area <= LARGEST_AREA:
            box = columns.start - 1, rows.start - 1, columns.stop + 1, rows.stop + 1  # room for soft edges
            roof = rectified(picture.image.crop(box), np.pad(building, 1), scale)
            if roof is not None and patchiness(roof) <= PATCHY:
                yield "villa roof" if area < VILLA_AREA else "large roof", roof


def rectified(image: Image.Image, building: NDArray[np.bool_], scale: NDArray[np.float64]) -> Image.Image | None:
    """Turn a building so that the sides of its smallest rectangle are parallel to the image's.

    Args:
        image: RGB, with the building.
        building: (H, W) like the image.
        scale: Pixels of the result per pixel of the image, in x and y.

    Returns:
        RGBA image of the rectangle; None if the building fills too little of it or a side is out of range.
    """
    y, x = np.nonzero(building & ~ndimage.binary_erosion(building))
    corners = np.concatenate([np.stack([x + dx, y + dy], 1) for dx in (0, 1) for dy in (0, 1)])
    centre, sides, angle = smallest_rectangle(corners * scale)
    area = building.sum() * scale.prod()
    if area < MIN_FILL * sides.prod() or sides.min() < SIDES[0] or sides.max() > SIDES[1]:
        return None
    width, height = (round(float(side)) for side in sides)
    # From the result, sampled twice as finely and then averaged, to the image
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn * (sides / (2 * width, 2 * height)) / scale[:, None]
    offset = (centre - turn @ (sides / 2)) / scale
    to_image = (*matrix[0], offset[0], *matrix[1], offset[1])
    colour, alpha = (
        layer.transform((2 * width, 2 * height), Image.Transform.AFFINE, to_image, method).reduce(2)
        for layer, method in (
            (image, Image.Resampling.BICUBIC),
            (Image.fromarray((building * 255).astype(np.uint8)), Image.Resampling.BILINEAR),
        )
    )
    colour.putalpha(alpha)
    return colour


def patchiness(roof: Image.Image) -> float:
    """Deviation of the brightness of a roof (RGBA), smoothed by 2 px, in grey levels."""
    pixels = np.asarray(roof, np.float32)
    inside = pixels[..., 3] > 127
    weights = ndimage.gaussian_filter(inside.astype(np.float32), 2)
    light = ndimage.gaussian_filter(pixels[..., :3].mean(-1) * inside, 2)
    return float((light[inside] / weights[inside]).std())


def cut_parts(picture: Picture) -> Iterator[Picture]:
    """Cut a picture into equal parts of at most `MAX_TILE` px.

    Args:
        picture: At 0.5 m/px.
    """
    bounds = []
    for side in picture.image.size:
        parts = -(-side // MAX_TILE)
        bounds.append([round(side * part / parts) for part in range(parts + 1)])
    for top, bottom in pairwise(bounds[1]):
        for left, right in pairwise(bounds[0]):
            labels = None if picture.labels is None else picture.labels[top:bottom, left:right]
            yield Picture(picture.image.crop((left, top, right, bottom)), labels, picture.pixel)


class Library:
    """A library while it is written.

    Args:
        folder: Existing empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[Material] = []
        self.counts: Counter[str] = Counter()
        for name in ("textures", "roofs", "tiles", "labels"):
            (folder / name).mkdir()

    def add(
        self, source: Source, place: Place, kind: MaterialKind, image: Image.Image, labels: Image.Image | None = None
    ) -> None:
        """Write an image and note its entry."""
        folder = {"tile": "tiles", "villa roof": "roofs", "large roof": "roofs"}.get(kind, "textures")
        self.counts[folder] += 1
        stem = f"{source.root.resolve().name}_{self.counts[folder]:05d}"
        file, label = f"{folder}/{stem}.{'png' if folder == 'roofs' else 'jpg'}", ""
        if folder == "roofs":
            image.save(self.folder / file)
        else:
            image.save(self.folder / file, quality=92 if folder == "tiles" else 95)
        if labels is not None:
            label = f"labels/{stem}.png"
            labels.save(self.folder / label)
        scene = place.scene if kind == "tile" else ""
        self.entries.append(Material(file, kind, source.name, place.region, place.split, source.licence, label, scene))

    def add_place(self, source: Source, place: Place) -> bool:
        """Cut everything from an image of a source; returns whether it shows a labelled building.

        Raises:
            FileNotFoundError, ValueError: As `read_picture`.
        """
        picture = read_picture(source, place)
        if picture.labels is not None:
            for kind, roof in cut_roofs(picture):
                self.add(source, place, kind, roof)
        for part in cut_parts(picture.resampled(METRES_PER_PIXEL)):
            large = min(part.image.size) >= MIN_TILE
            if part.labels is None:
                textures = cut_scene_textures(part.image, source.classes.get(place.scene, ()))
                if large:
                    self.add(source, place, "tile", part.image)
            else:
                textures = cut_labelled_textures(part.image, part.labels)
                labels = LABEL_VALUES[part.labels]
                if large and (labels != KEEP_OFF).mean() >= USEFUL_SHARE:
                    self.add(source, place, "tile", part.image, Image.fromarray(labels))
            for kind, texture in textures:
                self.add(source, place, kind, texture)
        return picture.labels is not None and bool((picture.labels == SURFACES.index("building")).any())

    def thin(self) -> None:
        """Keep at most `TEXTURES_PER_KIND` or `ROOFS_PER_KIND` of each source, kind and split, evenly chosen."""
        groups: dict[tuple[str, str, str], list[Material]] = defaultdict(list)
        for entry in self.entries:
            groups[entry.source, entry.kind, entry.split].append(entry)
        self.entries = []
        for (_, kind, _), entries in groups.items():
            most = ROOFS_PER_KIND if "roof" in kind else TEXTURES_PER_KIND
            if kind != "tile" and len(entries) > most:
                kept = [entries[i] for i in np.linspace(0, len(entries) - 1, most).round().astype(int)]
                for entry in set(entries).difference(kept):
                    (self.folder / entry.file).unlink()
                entries = kept
            self.entries += entries

    def write_json(self, sources: Sequence[tuple[Source, int]]) -> None:
        """Write materials.json.

        Args:
            sources: Each source, and how many images it has.
        """
        content = {
            "metres_per_pixel": METRES_PER_PIXEL,
            "sources": [
                {"name": source.name, "licence": source.licence, "images": images} for source, images in sources
            ],
            "entries": [{key: value for key, value in asdict(e).items() if value} for e in self.entries],
        }
        (self.folder / "materials.json").write_text(json.dumps(content, indent=1), encoding="utf-8")

    def draw_sheet(self) -> Image.Image:
        """Samples of each source and kind in a row, with how many there are in each split."""
        groups: dict[tuple[str, str], list[Material]] = defaultdict(list)
        for entry in self.entries:
            groups[entry.source, f"{entry.kind}{', labelled' if entry.label else ''}"].append(entry)
        rows, captions = [], []
        for (source, kind), entries in sorted(groups.items()):
            count = min(len(entries), SHEET_SAMPLES)
            rows.append(
                [self._sample(entries[i]) for i in np.linspace(0, len(entries) - 1, count).round().astype(int)]
            )
            splits = Counter(entry.split for entry in entries)
            captions.append(f"{kind}\n{source}\n" + ", ".join(f"{splits[split]} {split}" for split in splits))
        return contact_sheet(rows, captions, tile=SHEET_TILE)

    def _sample(self, entry: Material) -> Image.Image:
        """An entry on a square of the sheet: roofs and textures enlarged twice at most, tiles with their labels."""
        image: Image.Image = Image.open(self.folder / entry.file)
        if entry.label:
            labels = np.asarray(Image.open(self.folder / entry.label))
            dimmed = np.asarray(image) // np.where(labels == KEEP_OFF, 3, 1)[..., None].astype(np.uint8)
            image = overlay(Image.fromarray(dimmed), labels, opacity=0.25)
        if entry.kind == "tile":
            side = min(*image.size, 2 * SHEET_TILE)
            return image.crop((0, 0, side, side))
        square = Image.new("RGB", (SHEET_TILE, SHEET_TILE), (128, 128, 128))
        draw = ImageDraw.Draw(square)
        for x in range(0, SHEET_TILE, 16):
            for y in range(x // 16 % 2 * 16, SHEET_TILE, 32):
                draw.rectangle((x, y, x + 15, y + 15), (160, 160, 160))
        zoom = min(2, SHEET_TILE / max(image.size))
        image = image.convert("RGBA").resize([max(round(side * zoom), 1) for side in image.size])
        square.paste(image, ((SHEET_TILE - image.width) // 2, (SHEET_TILE - image.height) // 2), image)
        return square


def read_picture(source: Source, place: Place) -> Picture:
    """Read an image of a source and its labels, reduced to pixels of `FINEST` m where they are smaller.

    Raises:
        FileNotFoundError: If a file is missing.
        InputError: If a file cannot be read, the mask has another size, or an image that must be is no GeoTIFF.
    """
    metres = source.metres_per_pixel
    if metres is None or (place.labels is not None and place.labels.suffix == ".geojson"):
        from kcfi.training.materials.geotiff import read_geotiff  # needs the extra `geo`

        return read_geotiff(source, place.image, place.labels)
    image = read_image(place.image)
    labels = None if place.labels is None else source.read_mask(place.labels, image.size, place.image)
    picture = Picture(image, labels, (metres, metres))
    return picture.resampled(FINEST) if metres < FINEST else picture


def write_library(roots: Sequence[str | Path], output: str | Path) -> dict[str, int]:
    """Turn sources of single-date images into a library (`kcfi data materials`).

    The folder appears under its name when it is complete.

    Args:
        roots: Folders of the sources.
        output: Folder to create; it must be new or empty.

    Returns:
        How many materials there are of each kind.

    Raises:
        FileExistsError: If `output` is not empty.
        FileNotFoundError: If a folder, its description or a file is missing.
        InputError: If a description or a file is refused, or two sources have one name.
    """
    output = Path(output)
    check_new_folder(output)
    sources = [read_source(Path(root), list(LIMITS)) for root in roots]
    names = Counter(source.name for source in sources)
    if len(names) < len(sources):
        raise InputError(f"two sources are named '{names.most_common(1)[0][0]}': give each its own name")
    places = [source.places() for source in sources]
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary,
        tqdm(desc="cutting", total=sum(map(len, places)), unit="image") as bar,
    ):
        folder = Path(temporary) / "library"
        folder.mkdir()
        library = Library(folder)
        for source, its_places in zip(sources, places, strict=True):
            buildings = 0
            for place in its_places:
                buildings += library.add_place(source, place)
                bar.update()
            if source.labels and not buildings:
                raise InputError(
                    f"{source.root}: no building in any image. Are the colours of the masks those of the legend, do "
                    "the footprints lie where the images do?"
                )
        library.thin()
        library.write_json([(source, len(found)) for source, found in zip(sources, places, strict=True)])
        library.draw_sheet().save(folder / "contact_sheet.png")
        move_into_place(folder, output)
    return dict(Counter(entry.kind for entry in library.entries))
