"""Pairs made of one real image: the same place twice, some of its labelled buildings erased at one date.

No openly licensed before/after pairs exist, but single dates with building footprints do (single-temporal supervised
learning, ChangeStar, arXiv 2108.07002). An unchanged pair is one place under two looks (light, noise, blur,
registration). In a changed pair ground covers some of the buildings at one of the dates: they appear or are removed.
Ground also comes and goes elsewhere, at both dates, so that pasted ground alone tells nothing.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from kcfi.training.levir_cc import MASK_BUILDING
from kcfi.training.material_library import LAND, LibraryMaterials
from kcfi.training.synthetic_captions import Change, Ground, ObjectChange, locate
from kcfi.training.synthetic_layout import MARGIN, MIN_VISIBLE, GroundKind, ObjectKind, SyntheticSettings, crop
from kcfi.training.synthetic_materials import Array, crop_noise
from kcfi.training.synthetic_painting import draw_looks, photograph

VILLA_AREA = 1600  # px (400 m2): smaller footprints are villas, larger ones large buildings
LARGEST_AREA = 3500  # px (875 m2): what is larger is often a block of many houses under one label
REMOVED_SHARE = 0.2  # of the changed pairs
TRIALS = 12  # places looked at before a pair stays unchanged
GROUNDS: dict[GroundKind, Ground] = {"grass": "grass", "soil": "bareland", "field": ""}


@dataclass(frozen=True)
class Building:
    """A labelled building of a tile: its pixels on the canvas (canvas, canvas) and what it is called."""

    pixels: NDArray[np.bool_]
    kind: ObjectKind


def removable_buildings(labels: NDArray[np.uint8]) -> list[Building]:
    """The buildings of a canvas that can be told apart and named: clearly in view, compact, of a sensible size.

    Args:
        labels: (canvas, canvas), values of `LibraryMaterials.tile`.
    """
    numbers, _ = ndimage.label(labels == MASK_BUILDING)
    found = []
    for number, window in enumerate(ndimage.find_objects(numbers), 1):
        pixels = numbers == number
        area, visible = int(pixels.sum()), int(crop(pixels).sum())
        kind: ObjectKind = "villa" if area < VILLA_AREA else "large building"
        box = numbers[window].size
        if area <= LARGEST_AREA and visible >= max(MIN_VISIBLE[kind], 0.5 * area) and area >= 0.4 * box:
            found.append(Building(pixels, kind))
    return found


def _choose(buildings: list[Building], rng: np.random.Generator) -> list[Building]:
    """All, a few neighbours, or each by chance."""
    mode = rng.random()
    if mode < 0.25:
        return buildings
    if mode < 0.6:
        centres = np.array([ndimage.center_of_mass(b.pixels) for b in buildings])
        first = int(rng.integers(len(buildings)))
        order = np.hypot(*(centres - centres[first]).T).argsort()
        return [buildings[int(i)] for i in order[: int(rng.integers(1, 6))]]
    return [b for b in buildings if rng.random() < 0.5] or buildings[:1]


def _cover(image: Image.Image, ground: Image.Image, alpha: Array, colour: Array | None) -> Image.Image:
    """Paste ground over an image, in the given mean colour (RGB; None: its own)."""
    pixels = np.asarray(ground, np.float32)
    if colour is not None:
        pixels = pixels - pixels.mean((0, 1)) + colour
    covered = image.copy()
    mask = Image.fromarray((alpha.clip(0, 1) * 255).astype(np.uint8))
    covered.paste(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask=mask)
    return covered


def _draw_ground(rng: np.random.Generator) -> GroundKind:
    kinds: tuple[GroundKind, ...] = ("soil", "grass", "field")
    return kinds[int(rng.integers(len(kinds)))]


def _patches(image: Image.Image, free: Array, library: LibraryMaterials, rng: np.random.Generator) -> Image.Image:
    """Ground that comes or goes on free land: not a change."""
    if rng.random() < 0.5:
        return image
    blobs = crop_noise("blobs", image.width, rng)
    alpha = ((blobs - rng.uniform(0.3, 1.6)) * 3).clip(0, 1) * free
    ground = library.texture(_draw_ground(rng), image.width, rng)
    colour = _mean_colour(image, free) if rng.random() < 0.5 else None
    return _cover(image, ground, alpha, colour)


def _mean_colour(image: Image.Image, where: Array) -> Array | None:
    """Mean colour of the pixels where `where` > 0.5, (3,); None if there are too few."""
    pixels = np.asarray(image, np.float32)[where > 0.5]
    return pixels.mean(0) if len(pixels) > 200 else None


def draw_pair(
    library: LibraryMaterials, rng: np.random.Generator, changed: bool, settings: SyntheticSettings
) -> tuple[Image.Image, Image.Image, NDArray[np.uint8], Change]:
    """Draw a pair from one place of a library.

    Args:
        library: With tiles.
        rng: Source of chance.
        changed: Whether buildings should appear or go; the pair stays unchanged where no place has any.
        settings: Size, and which irrelevant changes happen.

    Returns:
        Image before, image after, mask (H, W) in LEVIR-MCI's values, and the facts for the captions.

    Raises:
        ValueError: If the library has no tiles.
    """
    canvas = settings.image_size + 2 * MARGIN
    place, labels, buildings = _draw_place(library, rng, changed, canvas)
    before = after = place
    mask, change = np.zeros((canvas, canvas), np.uint8), Change(())
    if labels is not None:
        away = ndimage.distance_transform_edt(labels == LAND)
        free = ((away - 3) / 4).clip(0, 1).astype(np.float32)
        if buildings:
            chosen = _choose(buildings, rng)
            pixels = np.any([b.pixels for b in chosen], axis=0)
            appears = bool(rng.random() >= REMOVED_SHARE)
            ground = _draw_ground(rng)
            colour = _mean_colour(place, free) if rng.random() < 0.5 else None
            near = 1 - ((ndimage.distance_transform_edt(~pixels) - 4) / 4).clip(0, 1)  # with most of the shadow
            others = ndimage.distance_transform_edt((labels < 128) | pixels)  # roads and buildings stay
            alpha = (near * (others / 2).clip(0, 1)).astype(np.float32)
            bare = _cover(place, library.texture(ground, canvas, rng), np.maximum(alpha, pixels), colour)
            before, after = (bare, place) if appears else (place, bare)
            mask[pixels] = MASK_BUILDING
            change = _measure(chosen, appears, GROUNDS[ground] if colour is None else "")
        if settings.ground:
            before, after = _patches(before, free, library, rng), _patches(after, free, library, rng)
    looks = draw_looks(rng, settings)
    return photograph(before, looks[0]), photograph(after, looks[1]), crop(mask), change


def _draw_place(
    library: LibraryMaterials, rng: np.random.Generator, changed: bool, canvas: int
) -> tuple[Image.Image, NDArray[np.uint8] | None, list[Building]]:
    """A place, its labels (None: unlabelled), and the buildings of which some shall change (empty: none)."""
    available = [labelled for labelled in (False, True) if library.has_tiles(labelled)] or [True]
    if changed and True in available:
        for _ in range(TRIALS):
            place, labels = library.tile(True, canvas, rng)
            buildings = removable_buildings(labels) if labels is not None else []
            if buildings:
                return place, labels, buildings
    place, labels = library.tile(available[int(rng.integers(len(available)))], canvas, rng)
    return place, labels, []


def _measure(chosen: list[Building], appears: bool, ground: Ground) -> Change:
    """The facts of a changed pair, read off the pixels of its changed buildings."""
    objects = []
    for kind in ("villa", "large building"):
        pixels = [crop(b.pixels) for b in chosen if b.kind == kind]
        if pixels:
            objects.append(ObjectChange(kind, len(pixels), locate(np.any(pixels, axis=0))))
    return Change(tuple(objects), appears, locate(np.any([crop(b.pixels) for b in chosen], axis=0)), ground)
