"""A sentence for every region by the model, and one for the scene by counting."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rasterio.windows import Window
from tqdm import tqdm

from kcfi.processing import Describer
from kcfi.processing import Region as ToldRegion
from kcfi.processing.describer_kcfi import tile_boxes
from kcfi.processing.places_kcfi import SCENE, Box
from kcfi.scenes.findings import Change, Grid, Kind
from kcfi.scenes.kept import Kept
from kcfi.scenes.reading import Layer, open_raster
from kcfi.scenes.regions import Region
from kcfi.scenes.tiles import read_both

MOST = 1024  # px: side of the reduced map of a large region in which its densest tile is looked for
NOUNS = {
    "building": r"(?:building|house|villa|home|factory|factories|roof|shed|warehouse|(?:power|industrial) plant|block"
    r"|residen\w+)s?",
    "road": r"(?:road|street|path|lane|highway|parking lot|driveway)s?",
}
APPEARED = re.compile(
    r"\b(?:appear\w*|built|build|constructed|construction|added|emerge\w*|shows? up|shown up|established|developed"
    r"|new|newly|erected|installed|paved)\b"
)
REMOVED = re.compile(
    r"\b(?:disappear\w*|remov\w+|demolish\w*|vanish\w*|destroyed|torn down|gone|cleared|dismantled|razed|lost)\b"
)
REPLACED = re.compile(
    r"\b(?:replaced (?:by|with)|turn\w* into|becomes?|became|changed? (?:in)?to|converted (?:in)?to)\b"
)
REPLACES = re.compile(r"\b(?:replaces?|takes? the place of)\b")
ATTRIBUTES = re.compile(rf"\bnew\s+|\b(?:newly\s+)?(?:built|constructed)\s+(?=(?:{'|'.join(NOUNS.values())})\b)")
AUXILIARY = re.compile(r"\b(?:is|are|was|were|has|have)\b")
CLAUSES = re.compile(r"\s*(?:[,;.]|\band\b|\bwhile\b|\bbut\b)\s*")


def kind_of(sentence: str, label: str) -> Kind:
    """Whether a sentence says that objects of a class appeared or were removed; "changed" where it does not say.

    A clause that names the class counts before the rest of the sentence: "some trees are removed and a house is built"
    tells of a building that appeared. "A new house" appeared if no verb says otherwise: "a new house is removed".
    """
    text = sentence.lower()
    noun = re.compile(rf"\b(?:{NOUNS.get(label, '|'.join(NOUNS.values()))})\b")
    for verb, kinds in ((REPLACED, ("removed", "appeared")), (REPLACES, ("appeared", "removed"))):
        if replaced := verb.search(text):
            named = [bool(noun.search(part)) for part in (text[: replaced.start()], text[replaced.end() :])]
            if named[0] != named[1]:
                return kinds[named.index(True)]  # type: ignore[return-value]
    bare = ATTRIBUTES.sub("", text)
    own, attributed = ([part for part in _clauses(told) if noun.search(part)] for told in (bare, text))
    for clauses in (own, attributed, [bare], [text]):
        came, went = (any(verb.search(clause) for clause in clauses) for verb in (APPEARED, REMOVED))
        if came != went:
            return "appeared" if came else "removed"
    return "changed"


def _clauses(text: str) -> list[str]:
    """The parts of a sentence, each with the verb that it shares with the next: "a road and a house are built"."""
    parts = [part for part in CLAUSES.split(text) if part]
    for index in range(len(parts) - 2, -1, -1):
        if not any(verb.search(parts[index]) for verb in (APPEARED, REMOVED, AUXILIARY)):
            parts[index] += " " + parts[index + 1]
    return parts


def place_of(point: tuple[float, float], grid: Grid) -> str:
    """The name of a place of the scene, given in pixels: "north-west", "centre", ..."""
    return SCENE.phrase(point[0] / grid.width, point[1] / grid.height).removeprefix("in the ")


def plain_sentence(label: str, place: str) -> str:
    """What the mask alone says of a region."""
    name = {"building": "a building", "road": "a road"}.get(label, "something")
    return f"{name} has changed in the {place} of the scene ."


def write_sentences(
    describer: Describer, before: Layer, after: Layer, regions: Sequence[Region], raster: Path, grid: Grid, kept: Kept
) -> list[str]:
    """The model's sentence for each region, of the tile around it; batches that are kept are not written again.

    Args:
        describer: writes them.
        before: the earlier date.
        after: the later one.
        regions: of `find_regions`.
        raster: of their numbers.
        grid: of the scene.
        kept: for batches.
    """
    sentences: list[str] = []
    size = describer.batch_size
    batches = [regions[first : first + size] for first in range(0, len(regions), size)]
    done = kept.count()
    with open_raster(raster) as numbers:
        progress = tqdm(batches, "sentences", unit="batch", disable=len(batches) < 2)
        for index, batch in enumerate(progress):
            if index >= done:
                kept.put(index, {"sentences": np.array(_told(describer, before, after, batch, numbers, grid))})
            sentences += kept.get(index)["sentences"].tolist()
    return sentences


def _told(
    describer: Describer, before: Layer, after: Layer, regions: Sequence[Region], numbers: Any, grid: Grid
) -> list[str]:
    """The sentences of a batch of regions."""
    told, parts = [], []
    for region in regions:
        box = _view(region, numbers, describer, grid)
        pixels = numbers.read(1, window=_window(box)) == region.number
        told.append(describer.told(ToldRegion(region.box, region.pixels), box, pixels, region.label))
        first, second, _ = read_both(before, after, box)
        parts.append((Image.fromarray(first), Image.fromarray(second)))
    describer.tell(told, parts, (grid.width, grid.height), SCENE)
    return [each.report.caption for each in told]


def _view(region: Region, numbers: Any, describer: Describer, grid: Grid) -> Box:
    """The tile that a region is looked at in: around its middle, or the one with most of it where it is larger."""
    left, top, right, bottom = region.box
    tile, width, height = describer.view, right - left, bottom - top
    if max(width, height) <= tile:
        return describer.window(region.box, grid.width, grid.height)
    shape = tuple(max(1, round(side * min(1, MOST / max(width, height)))) for side in (height, width))
    own = numbers.read(1, window=_window(region.box), out_shape=shape) == region.number
    total = np.pad(own.cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def inside(box: Box) -> int:
        x0, x1 = (round(side * shape[1] / width) for side in box[::2])
        y0, y1 = (round(side * shape[0] / height) for side in box[1::2])
        return int(total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0])

    best = max(tile_boxes(width, height, tile), key=inside)
    around = (best[0] + left, best[1] + top, best[2] + left, best[3] + top)
    return describer.window(around, grid.width, grid.height)


def _window(box: Box) -> Window:
    return Window(box[0], box[1], box[2] - box[0], box[3] - box[1])


def scene_caption(changes: Sequence[Change]) -> str:
    """The sentence of a scene: how many changes of each class and kind, their area, and where most of it lies."""
    if not changes:
        return "No change was found."
    groups = defaultdict(list)
    for change in changes:
        groups[change.label, change.kind].append(change)
    ordered = sorted(groups.items(), key=lambda group: -sum(change.pixels for change in group[1]))
    told = "; ".join(_group(label, kind, members) for (label, kind), members in ordered)
    return f"{_count(len(changes), 'change')}: {told}."


def _group(label: str, kind: str, members: Sequence[Change]) -> str:
    """The clause of a class and a kind, as "buildings appeared in 9 places (4,300 m2), mostly in the north-east"."""
    areas = [change.area_m2 for change in members if change.area_m2 is not None]
    measured = f"{sum(areas):,.0f} m2" if areas else f"{sum(change.pixels for change in members):,} px"
    where: dict[str, int] = defaultdict(int)
    for change in members:
        where[change.place] += change.pixels
    place, most = max(where.items(), key=lambda item: item[1])
    share = most / sum(where.values())
    located = f" in the {place}" if share == 1 else f", mostly in the {place}" if share > 0.5 else ""
    noun = {"building": "buildings", "road": "roads"}.get(label, "something")
    verb = "disappeared" if kind == "removed" else kind
    return f"{noun} {verb} in {_count(len(members), 'place')} ({measured}){located}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
