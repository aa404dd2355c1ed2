"""Pairs made of two real places: open land that was built on, open land that looks otherwise, and any two towns.

LEVIR-CC's most frequent change is woods or fields that became a suburb; nothing of the ground is the same at both
dates (docs/real_pairs.md). An image of open land in front of one with outlined buildings is such a change with real
pixels at both dates. Two images of open land of one class are an unchanged pair, so that other ground alone tells
nothing.

Of two outlined places, whatever they are, the change is known too: the buildings of the second that do not stand on
those of the first (single-temporal supervised learning, ChangeStar, arXiv 2108.07002). Nobody would describe that in a
sentence, so these pairs have none: their masks alone teach, densely, what a building is.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from kcfi.pictures import MASK_BUILDING
from kcfi.processing import InputError
from kcfi.training.synthetic.captions import Change, Ground, ObjectChange, locate
from kcfi.training.synthetic.layout import MARGIN, MIN_VISIBLE, ObjectKind, SyntheticSettings, crop
from kcfi.training.synthetic.material_library import KEEP_OFF, OPEN, VILLA_AREA, LibraryMaterials
from kcfi.training.synthetic.painting import draw_looks, photograph
from kcfi.training.synthetic.single_dates import REMOVED_SHARE, TRIALS, SingleDatePair

# Scene classes of UC Merced on which nothing is built, and what captions call the ground
OPEN_LAND: dict[str, Ground] = {"agricultural": "", "chaparral": "bareland", "forest": "trees"}

OUTLINED_TRIALS = 100  # places looked at before a library counts as one without outlined buildings

DENSEST = 0.25  # share of a place under roofs; changed pairs of LEVIR-CC have 0.09 on average (docs/real_pairs.md)


def open_scenes(library: LibraryMaterials) -> list[str]:
    """The scene classes of open land that a library has tiles of."""
    return sorted({entry.scene for entry in library.by_kind.get("tile", [])} & OPEN_LAND.keys())


def draw_developed(
    library: LibraryMaterials, rng: np.random.Generator, changed: bool, settings: SyntheticSettings
) -> SingleDatePair:
    """Draw a pair of two places of a library.

    Args:
        library: With tiles of open land, and tiles with outlined buildings.
        rng: Source of chance.
        changed: Whether buildings should appear or go; the pair stays unchanged where no place has any that may.
        settings: Size, and which changes happen.
    """
    canvas = settings.image_size + 2 * MARGIN
    scene = str(rng.choice(open_scenes(library)))
    bare, _ = library.tile(False, canvas, rng, scene)
    looks = draw_looks(rng, settings)
    nothing = np.zeros((settings.image_size,) * 2, np.uint8)
    appears = bool(rng.random() >= REMOVED_SHARE)
    for _ in range(TRIALS if changed else 0):
        place, labels = library.tile(True, canvas, rng)
        assert labels is not None  # of a labelled tile
        buildings = whole_buildings(labels)
        objects = _measure(buildings)
        if objects and buildings.mean() <= DENSEST and all(settings.allows(entry.kind, appears) for entry in objects):
            before, after = (bare, place) if appears else (place, bare)
            pixels = crop(buildings)
            change = Change(tuple(objects), appears, locate(pixels), OPEN_LAND[scene])
            mask = pixels.astype(np.uint8) * np.uint8(MASK_BUILDING)
            return SingleDatePair(photograph(before, looks[0]), photograph(after, looks[1]), mask, nothing > 0, change)
    other = library.tile(False, canvas, rng, scene)[0] if settings.ground else bare
    return SingleDatePair(photograph(other, looks[0]), photograph(bare, looks[1]), nothing, nothing > 0, Change(()))


def draw_two_places(
    library: LibraryMaterials, rng: np.random.Generator, changed: bool, settings: SyntheticSettings
) -> SingleDatePair:
    """Draw a pair without sentences: two places with outlined buildings, or one under two looks.

    Args:
        library: With tiles with outlined buildings, at least one of whose sources tells land from roads.
        rng: Source of chance.
        changed: Whether the places differ.
        settings: Size and looks.

    Raises:
        InputError: The library hardly has such places.
    """
    canvas = settings.image_size + 2 * MARGIN
    after, stands = _outlined(library, canvas, rng)
    before, stood = _outlined(library, canvas, rng) if changed else (after, stands)
    looks = draw_looks(rng, settings)
    mask = crop(stands & ~stood).astype(np.uint8) * np.uint8(MASK_BUILDING)
    images = photograph(before, looks[0]), photograph(after, looks[1])
    return SingleDatePair(*images, mask, crop(stands & stood), None)


def _outlined(
    library: LibraryMaterials, canvas: int, rng: np.random.Generator
) -> tuple[Image.Image, NDArray[np.bool_]]:
    """A place and the pixels of its buildings, of a source that outlines each."""
    for _ in range(OUTLINED_TRIALS):
        place, labels = library.tile(True, canvas, rng)
        assert labels is not None  # of a labelled tile
        if (labels == OPEN).any():
            return place, whole_buildings(labels)
    raise InputError(
        f"pair_mix asks for 'two_places' pairs, but {library.root} hardly has places whose buildings are outlined "
        "one by one: add a source such as Tartu to `kcfi data materials`, or leave that kind out"
    )


def whole_buildings(labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels of the buildings of a canvas whose source outlines them; the seams of a mosaic are closed.

    Args:
        labels: (canvas, canvas), values of `LibraryMaterials.tile`. Where a source tells ground from roads, its
            buildings are often blocks with their gardens (`OPEN` never occurs): no buildings then.
    """
    buildings = labels == MASK_BUILDING
    if not (labels == OPEN).any():
        return np.zeros_like(buildings)
    closed = ndimage.binary_closing(np.pad(buildings, 2, mode="edge"), iterations=2)[2:-2, 2:-2]
    return buildings | (closed & (labels == KEEP_OFF))


def _measure(buildings: NDArray[np.bool_]) -> list[ObjectChange]:
    """The buildings of a canvas that are clearly in view, by kind."""
    numbers, count = ndimage.label(buildings)
    areas, visible = (np.bincount(part.ravel(), minlength=count + 1)[1:] for part in (numbers, crop(numbers)))
    objects = []
    kinds: tuple[tuple[ObjectKind, NDArray[np.bool_]], ...] = (
        ("villa", areas < VILLA_AREA),
        ("large building", areas >= VILLA_AREA),
    )
    for kind, fits in kinds:
        chosen = np.flatnonzero(fits & (visible >= MIN_VISIBLE[kind])) + 1
        if chosen.size:
            objects.append(ObjectChange(kind, chosen.size, locate(np.isin(crop(numbers), chosen))))
    return objects
