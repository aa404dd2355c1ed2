"""Synthetic scenes: aerial before/after pairs in LEVIR-MCI's schema, drawn on the fly from a seed.

Real LEVIR-CC cannot be shipped, so the embedded model, the tests and the benchmarks train on these drawings. One pair
goes through four steps, each a pure function of (seed, split, index):

1. layout (`layout.py`): roads, villas, large buildings and woods of a place, some of them *changing*;
2. state: a changing object is there (1) or not (0) at each date. A pair whose objects appear has the states (0, 1), a
   pair whose objects are removed (1, 0). An unchanged pair is the same kind of layout with (0, 0) or (1, 1), so that
   no single image tells the two apart;
3. truth (`captions.py`): the change mask and, measured on its pixels, the facts that the five captions
   state. No texture is needed up to here;
4. picture (`painting.py`): each date is painted under its own light, season, trees, shadows, cars, noise and
   registration shift (the irrelevant changes), with textures from `Materials` (`textures.py`).

With a library of real surfaces (`kcfi data materials`) there are five kinds of pairs, mixed by `pair_mix`: "drawn"
(procedural textures), "composed" (the same geometry with real ground and roofs), "single_date" (one real image
twice, `single_dates.py`), "developed" (two real images, `developed.py`) and "two_places" (likewise, masks alone).
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from kcfi.files import check_new_folder
from kcfi.pictures import MASK_BUILDING, MASK_ROAD, contact_sheet, overlay
from kcfi.processing import InputError
from kcfi.training.data.shards import write_shards
from kcfi.training.synthetic.captions import ROWS, Change, Ground, ObjectChange, describe, locate
from kcfi.training.synthetic.developed import OPEN_LAND, draw_developed, draw_two_places, open_scenes
from kcfi.training.synthetic.layout import (
    MARGIN,
    Layout,
    Polygon,
    Shapes,
    SyntheticSettings,
    changing_objects,
    crop,
    draw_layout,
    drop_hardly_visible,
)
from kcfi.training.synthetic.material_library import LibraryMaterials, attributions
from kcfi.training.synthetic.painting import Cover, Look, Painter, Window, draw_cover, draw_looks, draw_window
from kcfi.training.synthetic.single_dates import SingleDatePair, draw_pair
from kcfi.training.synthetic.textures import Materials, ProceduralMaterials

__all__ = [
    "Change",
    "Materials",
    "ObjectChange",
    "ProceduralMaterials",
    "Scene",
    "SyntheticDataset",
    "SyntheticSettings",
    "describe",
    "draw_scene",
    "synthesize",
    "write_levir_mci",
]

SPLITS = {"train": 0, "val": 1, "test": 2}  # position of a split in the seed
PAIR_KINDS = ("drawn", "composed", "single_date", "developed", "two_places")
REAL_PLACES = {"single_date": draw_pair, "developed": draw_developed, "two_places": draw_two_places}
ZOOM = (0.7, 1.6)  # of pairs with real materials: users' images are not all at 0.5 m/px, nor all houses of one size


def _ground_below(layout: Layout, cover: Cover, changed: NDArray[np.bool_]) -> Ground:
    """What covers most of the changed pixels at the date without the objects; "" when mixed."""
    trees = crop(cover.trees)[changed]
    if trees.mean() > 0.45:
        return "trees"
    share = {kind: np.full_like(trees, kind == layout.ground) for kind in ("grass", "field", "soil")}
    for kind, alpha in cover.layers:
        opaque = crop(alpha)[changed]
        for other in share:
            share[other] *= 1 - opaque
        share[kind] += opaque
    if trees.mean() < 0.2:
        if (share["soil"] + share["field"]).mean() > 0.6:  # annotators call a dry field bareland too
            return "bareland"
        if share["grass"].mean() > 0.6:
            return "grass"
    return ""


def _measure(layout: Layout, objects: NDArray[np.uint8], ground: Ground) -> Change:
    """Read the facts of a changed pair off the pixels of its changed objects."""
    seen = set(np.unique(objects).tolist()) - {0}
    changed: list[ObjectChange] = []
    roads = [255 - i for i, road in enumerate(layout.roads) if 255 - i in seen]
    if roads:
        changed.append(ObjectChange("road", len(roads), locate(np.isin(objects, roads))))
    in_view = [_points_in_view(road.points, layout.canvas) >= 6 for road in layout.roads]
    for kind in ("villa", "large building"):
        numbers = [i + 1 for i, b in enumerate(layout.buildings) if b.kind == kind and i + 1 in seen]
        if numbers:
            found = [layout.buildings[i - 1] for i in numbers]
            sides = {(b.road, b.side) for b in found}
            both_sides = len(found) > 2 and any(side and (road, -side) in sides for road, side in sides)
            road = _name_roads({b.road for b in found}, layout, in_view)
            position = locate(np.isin(objects, numbers))
            lengths = Counter((b.road, b.side) for b in found)
            rows = len(lengths) if kind == "villa" and road and min(lengths.values()) >= ROWS else 0
            parking = kind == "large building" and all(b.parking for b in found)
            changed.append(ObjectChange(kind, len(found), position, road, both_sides and road != "", rows, parking))
    return Change(tuple(changed), layout.appears, locate(objects > 0), ground)


def _name_roads(
    indices: set[int], layout: Layout, in_view: list[bool]
) -> Literal["", "road", "roads", "new road", "new roads"]:
    """The noun for the roads that buildings stand along, "" if one of them stands along none that can be seen."""
    if any(i < 0 or not in_view[i] for i in indices):
        return ""
    if all(layout.roads[i].changing for i in indices):
        return "new road" if len(indices) == 1 else "new roads"
    return "road" if len(indices) == 1 else "roads"


def _points_in_view(points: Polygon, canvas: int) -> int:
    return int(((points > MARGIN) & (points < canvas - MARGIN)).all(-1).sum())


@dataclass(frozen=True)
class Scene:
    """A pair before it is painted: what stands where at both dates, and how the dates look.

    Attributes:
        layout: The place.
        states: State of the changing objects before and after; equal when nothing changes.
        looks: Looks of both dates.
        window: Where random fields are cut from the cached ones.
    """

    layout: Layout
    states: tuple[int, int]
    looks: tuple[Look, Look]
    window: Window

    @cached_property
    def objects(self) -> NDArray[np.uint8]:
        """Pixels of the changed objects, see `changing_objects`; in the frame of the after image, (H, W)."""
        objects = changing_objects(self.layout)
        return objects if self.states[0] != self.states[1] else np.zeros_like(objects)

    @cached_property
    def mask(self) -> NDArray[np.uint8]:
        """Changed pixels in LEVIR-MCI's values: 0, 128 (road), 255 (building), (H, W)."""
        roads = self.objects >= 255 - len(self.layout.roads)
        return np.where(roads, MASK_ROAD, np.where(self.objects > 0, MASK_BUILDING, 0)).astype(np.uint8)

    @cached_property
    def standing(self) -> NDArray[np.bool_]:
        """Pixels of buildings that stand at both dates, (H, W)."""
        shapes = Shapes(self.layout.canvas)
        for building in self.layout.present_buildings(min(self.states)):
            for polygon in building.footprint():
                shapes.polygon(polygon)
        return crop(shapes.sharp()) > 0

    @cached_property
    def change(self) -> Change:
        """The facts that captions state."""
        if not self.objects.any():
            return Change(())
        bare = self.before if self.layout.appears else self.after
        return _measure(self.layout, self.objects, _ground_below(self.layout, bare, self.objects > 0))

    @cached_property
    def before(self) -> Cover:
        """Ground and trees at the before date."""
        return draw_cover(self.layout, self.states[0], self.looks[0], self.window)

    @cached_property
    def after(self) -> Cover:
        """Ground and trees at the after date."""
        return draw_cover(self.layout, self.states[1], self.looks[1], self.window)


def draw_scene(rng: np.random.Generator, changed: bool, settings: SyntheticSettings) -> Scene:
    """Draw everything but pixels of a pair (steps 1 to 3 of the module's description).

    Args:
        rng: Source of chance.
        changed: Whether a relevant change must happen; needs at least one relevant switch in `settings`.
        settings: What may change.
    """
    layout = None
    while layout is None:
        layout = drop_hardly_visible(draw_layout(rng, settings))
    state = int(rng.integers(2))
    states = ((0, 1) if layout.appears else (1, 0)) if changed else (state, state)
    return Scene(layout, states, draw_looks(rng, settings), draw_window(rng, layout.canvas))


class SyntheticDataset(Dataset[dict[str, Any]]):
    """Drawn pairs in LEVIR-MCI's schema; every second pair is changed.

    `ds[i]` is the example of `pairs.py` with a mask and five captions, a pure function of all arguments and i.

    Args:
        num_pairs: Length. The pairs of a shorter data set are the first ones of a longer one.
        split: "train", "val" or "test": never the same pairs.
        seed: Which world to draw.
        settings: What may change.
        materials: Source of texture of "composed" pairs, and of "single_date" pairs if it is a library.
        pair_mix: Weights of the kinds of pairs, see the module's description. Default: all with sentences
            that are possible alike, only drawn ones without `materials`.

    Raises:
        InputError: If the split, a kind or a weight is wrong, or a kind needs materials that are not given.
    """

    def __init__(
        self,
        num_pairs: int,
        split: str = "train",
        seed: int = 0,
        settings: SyntheticSettings | None = None,
        materials: Materials | None = None,
        pair_mix: Mapping[str, float] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise InputError(f"synthetic scenes have no split {split!r}: choose one of {', '.join(SPLITS)}")
        self.num_pairs, self.split, self.seed = num_pairs, split, seed
        self.settings = settings or SyntheticSettings()
        self.materials = materials
        library = materials if isinstance(materials, LibraryMaterials) and materials.has_tiles(labelled=True) else None
        possible = {"drawn": True, "composed": materials is not None, "single_date": library is not None}
        possible["developed"] = library is not None and bool(open_scenes(library))
        self.mix = check_pair_mix(pair_mix or {kind: 1.0 for kind, is_possible in possible.items() if is_possible})
        if self.mix["composed"] and not possible["composed"]:
            raise InputError("pair_mix asks for 'composed' pairs: they need a library of `kcfi data materials`")
        for kind in ("single_date", "two_places"):
            if self.mix[kind] and library is None:
                raise InputError(
                    f"pair_mix asks for {kind!r} pairs: they need a library of `kcfi data materials` with labelled "
                    f"tiles of split '{split}'"
                )
        if self.mix["developed"] and not possible["developed"]:
            raise InputError(
                "pair_mix asks for 'developed' pairs: they need a library of `kcfi data materials` with labelled "
                f"tiles and tiles of open land ({', '.join(OPEN_LAND)}) of split '{split}'"
            )

    def __len__(self) -> int:
        return self.num_pairs

    def kind(self, index: int) -> str:
        """Which kind of pair stands at an index."""
        return self._kind_and_side(index)[0]

    def _kind_and_side(self, index: int) -> tuple[str, int]:
        """The kind of a pair, and the side in px that it is drawn at before it is resized to `image_size`."""
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, SPLITS[self.split], index, 1)))
        kind = str(rng.choice(PAIR_KINDS, p=list(self.mix.values())))
        side = self.settings.image_size
        return kind, side if kind == "drawn" else min(512, max(64, round(side / rng.uniform(*ZOOM))))

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The scene of a drawn or composed pair, at the side it is drawn at, and the generator for its captions."""
        rng, changed = self._chance(index)
        if self.kind(index) in REAL_PLACES:
            raise InputError(f"pair {index} is made of real places: it has no scene")
        return draw_scene(rng, changed, self._settings(index)), rng

    def _settings(self, index: int) -> SyntheticSettings:
        return replace(self.settings, image_size=self._kind_and_side(index)[1])

    def _chance(self, index: int) -> tuple[np.random.Generator, bool]:
        """The generator of a pair, and whether the pair is to change."""
        if not 0 <= index < self.num_pairs:
            raise IndexError(f"pair {index} of a synthetic data set of {self.num_pairs} pairs")
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, SPLITS[self.split], index)))
        return rng, index % 2 == 1 and bool(self.settings.scenarios())

    def _painter(self, index: int, scene: Scene, rng: np.random.Generator) -> Painter:
        real = self.materials if self.kind(index) == "composed" else None
        return Painter(scene.layout, scene.window, real or ProceduralMaterials(), rng)

    def _real_places(self, index: int) -> tuple[SingleDatePair, np.random.Generator] | None:
        """A pair of real places and the generator for its captions; None if the index holds another kind."""
        draw = REAL_PLACES.get(self.kind(index))
        if draw is None or not isinstance(self.materials, LibraryMaterials):
            return None
        rng, changed = self._chance(index)
        return draw(self.materials, rng, changed, self._settings(index)), rng

    def truth(self, index: int) -> tuple[NDArray[np.uint8], Change, list[str]]:
        """Mask (H, W), facts and captions of a drawn pair, not painted: for pretraining a language model."""
        scene, rng = self.scene(index)
        return scene.mask, scene.change, describe(scene.change, rng)

    def paint_after(self, index: int) -> tuple[Image.Image, Scene]:
        """The after image of a drawn pair alone, and the scene: for pretraining a vision tower."""
        scene, rng = self.scene(index)
        painter = self._painter(index, scene, rng)
        return painter.paint(scene.states[1], scene.looks[1], scene.after), scene

    def standing(self, index: int) -> NDArray[np.bool_]:
        """Pixels of (labelled) buildings that stand at both dates, (H, W)."""
        single = self._real_places(index)
        pixels = single[0].standing if single else self.scene(index)[0].standing
        return np.asarray(self._resized(Image.fromarray(pixels)))

    def _resized(self, image: Image.Image, method: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
        return image.resize((self.settings.image_size,) * 2, method)

    def __getitem__(self, index: int) -> dict[str, Any]:
        single = self._real_places(index)
        if single is not None:
            pair, rng = single
            before, after, mask, change = pair.before, pair.after, pair.mask, pair.change
            captions = [] if change is None else describe(change, rng)
        else:
            scene, rng = self.scene(index)
            mask, change = scene.mask, scene.change
            captions = describe(change, rng)
            painter = self._painter(index, scene, rng)
            before = painter.paint(scene.states[0], scene.looks[0], scene.before)
            after = painter.paint(scene.states[1], scene.looks[1], scene.after)
        return {
            "image_before": self._resized(before, Image.Resampling.BICUBIC),
            "image_after": self._resized(after, Image.Resampling.BICUBIC),
            "mask": self._resized(Image.fromarray(mask)),
            "captions": captions,
            "changed": bool(mask.any()),
            "filename": f"{self.split}_{index:06d}.png",
            "split": self.split,
        }


def check_pair_mix(mix: Mapping[str, float]) -> dict[str, float]:
    """Weights of all kinds of pairs, summing to 1.

    Raises:
        InputError: An unknown kind, a negative weight, or nothing but zeros.
    """
    for name in mix:
        if name not in PAIR_KINDS:
            raise InputError(f"pair_mix has no kind {name!r}: choose among {', '.join(PAIR_KINDS)}")
    weights = {kind: float(mix.get(kind, 0)) for kind in PAIR_KINDS}
    total = sum(weights.values())
    if not (min(weights.values()) >= 0 and 0 < total < math.inf):
        raise InputError(f"pair_mix is {dict(mix)}: give weights of at least 0, one of them above")
    return {kind: weight / total for kind, weight in weights.items()}


SHEET_ROWS = 12  # pairs on the contact sheet of `synthesize`


def write_levir_mci(datasets: Sequence[SyntheticDataset], root: Path) -> None:
    """Write data sets, usually one per split, as one folder in LEVIR-MCI's layout (see `levir_cc.py`).

    Args:
        datasets: What to write; no two pairs may share split and filename.
        root: Folder to create; it must be new or empty.

    Raises:
        FileExistsError: If the folder is not empty.
    """
    check_new_folder(root)
    records: list[dict[str, Any]] = []
    pairs = ((dataset, index) for dataset in datasets for index in range(len(dataset)))
    for dataset, index in tqdm(pairs, "drawing", sum(map(len, datasets)), unit="pair"):
        example, number = dataset[index], len(records)
        for name, key in (("A", "image_before"), ("B", "image_after"), ("label", "mask")):
            folder = root / "images" / example["split"] / name
            folder.mkdir(parents=True, exist_ok=True)
            example[key].save(folder / example["filename"])
        sentences = [
            {"raw": raw, "tokens": raw.removesuffix(" .").split(), "imgid": number, "sentid": 5 * number + i}
            for i, raw in enumerate(example["captions"])
        ]
        records.append(
            {
                "filename": example["filename"],
                "filepath": example["split"],
                "split": example["split"],
                "imgid": number,
                "changeflag": int(example["changed"]),
                "sentences": sentences,
            }
        )
    (root / "LevirCCcaptions.json").write_text(json.dumps({"images": records}), encoding="utf-8")


def synthesize(
    output: str | Path,
    pairs: int,
    seed: int = 0,
    settings: SyntheticSettings | None = None,
    materials: str | Path | None = None,
    pair_mix: Mapping[str, float] | None = None,
) -> None:
    """Write drawn pairs as a LEVIR-MCI folder with a sheet of the first ones (`kcfi data synthesize`).

    Args:
        output: Folder to create; it must be new or empty.
        pairs: Number of pairs, at least 10: a tenth is "val", a tenth "test", the rest "train".
        seed: Seed of the scenes.
        settings: What may change.
        materials: Library of `kcfi data materials`; each split is made of its own materials.
        pair_mix: See `SyntheticDataset`.

    Raises:
        InputError: If `pairs` is below 10, or for what `SyntheticDataset` refuses.
        FileExistsError: If the folder is not empty.
    """
    if pairs < 10:
        raise InputError(f"{pairs} pairs cannot be split into train, val and test: ask for at least 10")
    counts = {"train": pairs - 2 * (pairs // 10), "val": pairs // 10, "test": pairs // 10}
    datasets = [
        SyntheticDataset(
            count, split, seed, settings, LibraryMaterials(materials, split) if materials else None, pair_mix
        )
        for split, count in counts.items()
    ]
    write_levir_mci(datasets, Path(output))
    examples = [datasets[0][index] for index in range(min(SHEET_ROWS, counts["train"]))]
    contact_sheet(
        [[e["image_before"], e["image_after"], overlay(e["image_after"], e["mask"])] for e in examples],
        ["\n".join([e["filename"], *e["captions"]]) for e in examples],
        ["before", "after", "change"],
    ).save(Path(output) / "contact_sheet.png")


def synthesize_shards(output: str | Path, pairs: int, seed: int = 0, **options: Any) -> None:
    """Write drawn pairs as parquet shards (`kcfi data synthesize --shards`): drawn once, read in every epoch.

    Args:
        output: Folder to create; it must be new or empty.
        pairs: See `synthesize`.
        seed: See `synthesize`.
        **options: Further ones of `synthesize`.

    Raises:
        InputError: See `synthesize`.
        FileExistsError: If the folder is not empty.
    """
    output = Path(output)
    check_new_folder(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as folder:
        synthesize(Path(folder) / "pairs", pairs, seed, **options)
        write_shards(Path(folder) / "pairs", output, _origin(seed, options.get("materials")))


def _origin(seed: int, materials: str | Path | None) -> str:
    """What the card of drawn shards says of where the pairs come from."""
    text = f"Drawn by `kcfi data synthesize --shards` with seed {seed}: no pair shows a change that happened."
    if materials is None:
        return text
    sources = "".join(f"\n- {source}" for source in attributions(materials))
    return f"{text} Images of the ground are of\nthese sources, whose terms apply:\n{sources}"
