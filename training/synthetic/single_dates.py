"""Pairs made of one real image: the same place twice, some of its labelled buildings erased at one date.

No openly licensed before/after pairs exist, but single dates with building footprints do (single-temporal supervised
learning, ChangeStar, arXiv 2108.07002). An unchanged pair is one place under two looks (light, noise, blur,
registration). In a changed pair ground covers some of the buildings at one of the dates: they appear or are removed.
In both kinds of pairs ground may cover other buildings at both dates, and free land at either, so that pasted ground
alone tells nothing.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from kcfi.pictures import MASK_BUILDING, MASK_ROAD
from kcfi.training.synthetic.captions import Change, Ground, ObjectChange, locate
from kcfi.training.synthetic.layout import MARGIN, MIN_VISIBLE, GroundKind, ObjectKind, SyntheticSettings, crop
from kcfi.training.synthetic.material_library import KEEP_OFF, LAND, OPEN, VILLA_AREA, LibraryMaterials
from kcfi.training.synthetic.painting import draw_looks, photograph
from kcfi.training.synthetic.textures import Array, Materials, crop_noise

LARGEST_AREA = 2000  # px (500 m2): larger labels are often blocks of many houses, which cannot be counted
REMOVED_SHARE = 0.15  # of the changed pairs
UNLABELLED_SHARE = 0.25  # of the unchanged pairs, where the library has both: changed pairs are always labelled
TRIALS = 12  # places looked at before a pair stays unchanged
GROUNDS: dict[GroundKind, Ground] = {"grass": "grass", "soil": "bareland", "field": ""}


@dataclass(frozen=True, eq=False)
class Footprint:
    """A labelled building: its pixels on the canvas (canvas, canvas) and what it is called."""

    pixels: NDArray[np.bool_]
    kind: ObjectKind


@dataclass(frozen=True)
class SingleDatePair:
    """A pair made of one place.

    Attributes:
        before: Image before.
        after: Image after.
        mask: Changed pixels in LEVIR-MCI's values, (H, W).
        standing: Pixels of labelled buildings that stand at both dates, (H, W).
        change: The facts for the captions; None where no sentence would be true.
    """

    before: Image.Image
    after: Image.Image
    mask: NDArray[np.uint8]
    standing: NDArray[np.bool_]
    change: Change | None


def removable_buildings(labels: NDArray[np.uint8]) -> list[Footprint]:
    """The buildings of a canvas that can be told apart and named: whole, compact, of a sensible size, clearly in view.

    Args:
        labels: (canvas, canvas), values of `LibraryMaterials.tile`. What touches the border or `KEEP_OFF` may go on.
    """
    numbers, count = ndimage.label(labels == MASK_BUILDING)
    cut = np.pad(labels == KEEP_OFF, 1, constant_values=True)  # with the border around
    cut = ndimage.binary_dilation(cut)[1:-1, 1:-1]
    areas = np.bincount(numbers.ravel(), minlength=count + 1)
    visible = np.bincount(crop(numbers).ravel(), minlength=count + 1)
    touching = np.bincount(numbers[cut], minlength=count + 1)
    found = []
    for number, window in enumerate(ndimage.find_objects(numbers), 1):
        area = int(areas[number])
        kind: ObjectKind = "villa" if area < VILLA_AREA else "large building"
        clear = visible[number] >= max(MIN_VISIBLE[kind], 0.5 * area) and not touching[number]
        if clear and area <= LARGEST_AREA and area >= 0.4 * numbers[window].size:
            found.append(Footprint(numbers == number, kind))
    return found


def _choose(buildings: list[Footprint], rng: np.random.Generator) -> list[Footprint]:
    """All, a few neighbours, or each by chance."""
    mode = rng.random()
    if mode < 0.25:
        return buildings
    if mode < 0.6:
        centres = np.array([[axis.mean() for axis in np.nonzero(b.pixels)] for b in buildings])
        order = np.hypot(*(centres - centres[int(rng.integers(len(buildings)))]).T).argsort()
        return [buildings[int(i)] for i in order[: int(rng.integers(1, 6))]]
    return [b for b in buildings if rng.random() < 0.5] or buildings[:1]


class _Earth:
    """Grass, soil and field of a library to cover a place with.

    Args:
        materials: Source of texture.
        colour: Mean colour of the place's own open land, (3,); None if it has too little.
    """

    def __init__(self, materials: Materials, colour: Array | None) -> None:
        self.materials, self.colour = materials, colour

    def cover(self, image: Image.Image, alpha: Array, rng: np.random.Generator) -> tuple[Image.Image, Ground]:
        """Paste ground, in its own colour or in that of the place; returns the image and the name of the ground."""
        kind = list(GROUNDS)[int(rng.integers(len(GROUNDS)))]
        pixels = np.asarray(self.materials.texture(kind, image.width, rng), np.float32)
        own = rng.random() < 0.5 or self.colour is None
        if self.colour is not None and not own:
            pixels = pixels - pixels.mean((0, 1)) + self.colour
        covered = image.copy()
        mask = Image.fromarray((alpha.clip(0, 1) * 255).astype(np.uint8))
        covered.paste(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask=mask)
        return covered, GROUNDS[kind] if own else ""


def _around(pixels: NDArray[np.bool_], labels: NDArray[np.uint8]) -> Array:
    """Alpha that covers buildings and most of their shadows, but no road and no other building."""
    near = 1 - ((ndimage.distance_transform_edt(~pixels) - 4) / 4).clip(0, 1)
    others = ndimage.distance_transform_edt((labels < MASK_ROAD) | pixels)
    return np.maximum(near * (others / 2).clip(0, 1), pixels).astype(np.float32)


def _patches(image: Image.Image, labels: NDArray[np.uint8], earth: _Earth, rng: np.random.Generator) -> Image.Image:
    """Ground that comes or goes on free land: not a change."""
    if rng.random() < 0.5:
        return image
    free = ((ndimage.distance_transform_edt(labels == LAND) - 3) / 4).clip(0, 1)
    blobs = crop_noise("blobs", image.width, rng)
    alpha = ((blobs - rng.uniform(0.3, 1.6)) * 3).clip(0, 1) * free
    return earth.cover(image, alpha.astype(np.float32), rng)[0]


def _union(buildings: list[Footprint], canvas: int) -> NDArray[np.bool_]:
    return np.any([b.pixels for b in buildings] or [np.zeros((canvas, canvas), np.bool_)], axis=0)


def draw_pair(
    library: LibraryMaterials, rng: np.random.Generator, changed: bool, settings: SyntheticSettings
) -> SingleDatePair:
    """Draw a pair from one place of a library.

    Args:
        library: With labelled tiles.
        rng: Source of chance.
        changed: Whether buildings should appear or go; the pair stays unchanged where no place has any.
        settings: Size, and which changes happen.
    """
    canvas = settings.image_size + 2 * MARGIN
    place, labels, buildings = _draw_place(library, rng, changed, canvas)
    looks = draw_looks(rng, settings)
    if labels is None:
        nothing = np.zeros((settings.image_size,) * 2, np.uint8)
        before, after = (photograph(place, look) for look in looks)
        return SingleDatePair(before, after, nothing, nothing > 0, Change(()))

    open_land = np.asarray(place, np.float32)[(labels == LAND) | (labels == OPEN)]
    earth = _Earth(library, open_land.mean(0) if len(open_land) > 200 else None)
    chosen: list[Footprint] = []
    if changed and buildings:
        appears = bool(rng.random() >= REMOVED_SHARE)
        chosen = [b for b in _choose(buildings, rng) if settings.allows(b.kind, appears)]
    gone = [b for b in buildings if b not in chosen and rng.random() < 0.5] if rng.random() < 0.5 else []
    if gone:  # at both dates
        pixels = _union(gone, canvas)
        place, _ = earth.cover(place, _around(pixels, labels), rng)
        labels = np.where(pixels, LAND, labels).astype(np.uint8)
    before = after = place
    pixels, change = _union(chosen, canvas), Change(())
    if chosen:
        bare, ground = earth.cover(place, _around(pixels, labels), rng)
        before, after = (bare, place) if appears else (place, bare)
        change = _measure(chosen, appears, ground)
    if settings.ground:
        before, after = _patches(before, labels, earth, rng), _patches(after, labels, earth, rng)
    return SingleDatePair(
        photograph(before, looks[0]),
        photograph(after, looks[1]),
        crop(pixels).astype(np.uint8) * np.uint8(MASK_BUILDING),
        crop((labels == MASK_BUILDING) & ~pixels),
        change,
    )


def _draw_place(
    library: LibraryMaterials, rng: np.random.Generator, changed: bool, canvas: int
) -> tuple[Image.Image, NDArray[np.uint8] | None, list[Footprint]]:
    """A place, its labels (None: unlabelled), and the buildings that can be erased."""
    if not changed and library.has_tiles(labelled=False) and rng.random() < UNLABELLED_SHARE:
        return *library.tile(False, canvas, rng), []
    for _ in range(TRIALS):
        place, labels = library.tile(True, canvas, rng)
        assert labels is not None  # of a labelled tile
        buildings = removable_buildings(labels)
        if buildings or not changed:
            break
    return place, labels, buildings


def _measure(chosen: list[Footprint], appears: bool, ground: Ground) -> Change:
    """The facts of a changed pair, read off the pixels of its changed buildings."""
    objects = []
    for kind in ("villa", "large building"):
        pixels = [crop(b.pixels) for b in chosen if b.kind == kind]
        if pixels:
            objects.append(ObjectChange(kind, len(pixels), locate(np.any(pixels, axis=0))))
    return Change(tuple(objects), appears, locate(np.any([crop(b.pixels) for b in chosen], axis=0)), ground)
