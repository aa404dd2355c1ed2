"""Synthetic scenes: deterministic, switchable, and never a false caption."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from kcfi.processing.places_kcfi import UNCHANGED_SENTENCES
from kcfi.training.data.levir_cc import LevirCCDataset
from kcfi.training.load import load_pairs
from kcfi.training.synthetic import painting
from kcfi.training.synthetic.captions import locate
from kcfi.training.synthetic.dataset import (
    Change,
    ObjectChange,
    ProceduralMaterials,
    Scene,
    SyntheticDataset,
    SyntheticSettings,
    describe,
    draw_scene,
    synthesize,
    synthesize_shards,
)
from kcfi.training.synthetic.layout import Frame
from kcfi.training.synthetic.material_library import LibraryMaterials
from kcfi.training.synthetic.painting import Look, _lay_roof
from kcfi.training.synthetic.single_dates import draw_pair

CAPTIONS = Path(__file__).parents[3] / "../shared/data/levir_cc_captions.json.gz"
STOCK = [f"{sentence} ." for sentence in UNCHANGED_SENTENCES]
IRRELEVANT = [field.name for field in fields(Look)]
RELEVANT = [field.name for field in fields(SyntheticSettings) if field.name.endswith(("appear", "removed"))]


def only(*switches: str, **values: int) -> SyntheticSettings:
    """Settings in which nothing but the given switches is on."""
    return SyntheticSettings(**{name: name in switches for name in IRRELEVANT + RELEVANT}, **values)


KINDS = {"road": {"road"}, "large building": {"large building"}, "building": {"villa", "large building"}}


def named_objects(caption: str) -> list[tuple[str, set[str]]]:
    """(count word, kinds it may be) of every object with an indefinite count in a caption."""
    found = re.findall(
        r"\b(a row of|(?:(?:two|three) )?rows of|a|two|three|four|some|several|many|massive|lots of) "
        r"(?:new |detached )?(large building|building|villa|house|road)s?\b",
        caption,
    )
    return [(count, KINDS.get(noun, {"villa"})) for count, noun in found]


def count_fits(word: str, count: int) -> bool:
    exact = {"a": 1, "two": 2, "three": 3, "four": 4}
    if word in exact:
        return count == exact[word]
    if "row" in word:
        return count >= {"two": 6, "thr": 9}.get(word[:3], 3)
    return 3 <= count <= 6 if word in ("some", "several") else count >= 7


def clauses(caption: str) -> list[str]:
    """The parts of a caption that have a verb each; their position words belong to the objects they name."""
    parts = caption.split(" and ")
    verbs = re.compile("appear|built|constructed|show|removed|demolished|replace")
    return parts if all(verbs.search(part) for part in parts) else [caption]


def position_fits(caption: str, pixels: np.ndarray) -> bool:
    """Whether the position words of a caption agree with the centroid of pixels."""
    y, x = (np.array(ndimage.center_of_mass(pixels)) + 0.5) / pixels.shape
    holds = {
        "top": y < 0.4,
        "bottom": y > 0.6,
        "left": x < 0.4,
        "right": x > 0.6,
        "center": 0.25 < x < 0.75 and 0.25 < y < 0.75,
        "middle": 0.25 < x < 0.75 and 0.25 < y < 0.75,
    }
    return all(holds[word] for word in caption.split() if word in holds)


def test_examples_have_the_schema_of_levir_mci():
    example = SyntheticDataset(2)[1]
    assert example["image_before"].mode == example["image_after"].mode == "RGB"
    assert example["image_before"].size == example["image_after"].size == example["mask"].size == (256, 256)
    assert example["mask"].mode == "L"
    assert set(np.unique(example["mask"])) <= {0, 128, 255}
    assert len(example["captions"]) == len(set(example["captions"])) == 5
    assert (example["filename"], example["split"], example["changed"]) == ("train_000001.png", "train", True)


def test_a_pair_depends_on_seed_split_and_index_alone():
    def drawn(dataset: SyntheticDataset, index: int) -> tuple[bytes, ...]:
        example = dataset[index]
        images = [example[key].tobytes() for key in ("image_before", "image_after", "mask")]
        return *images, json.dumps(example["captions"]).encode()

    first = SyntheticDataset(4)
    expected = drawn(first, 3)
    first[0]
    assert drawn(first, 3) == expected == drawn(SyntheticDataset(1000), 3)
    others = [SyntheticDataset(4, "val"), SyntheticDataset(4, "test"), SyntheticDataset(4, seed=1)]
    assert len({expected[1], drawn(first, 1)[1], *(drawn(dataset, 3)[1] for dataset in others)}) == 5


def test_indexing_past_the_end_stops_a_loop():
    with pytest.raises(IndexError, match="pair 2"):
        SyntheticDataset(2)[2]


def test_truth_is_what_the_example_says():
    dataset = SyntheticDataset(6)
    for index in range(6):
        mask, change, captions = dataset.truth(index)
        example = dataset[index]
        assert (np.asarray(example["mask"]) == mask).all()
        assert (example["captions"], example["changed"]) == (captions, bool(change.objects))


def test_half_of_the_pairs_are_unchanged_with_stock_sentences_and_an_empty_mask():
    dataset = SyntheticDataset(40)
    for index in range(40):
        mask, change, captions = dataset.truth(index)
        assert (captions == STOCK) == (not mask.any()) == (not change.objects) == (index % 2 == 0)


@pytest.mark.parametrize("image_size", [256, 128])
def test_captions_say_what_the_mask_shows(image_size):
    dataset = SyntheticDataset(321, settings=SyntheticSettings(image_size=image_size))
    large_area = 2000  # px; no villa covers more
    for index in range(1, 321, 2):
        mask, change, captions = dataset.truth(index)
        labels, buildings = ndimage.label(mask == 255, np.ones((3, 3)))
        areas = np.bincount(labels.ravel())[1:]
        kinds = {entry.kind: entry for entry in change.objects}
        for caption in captions:
            named = named_objects(caption)
            buildings_named = {"villa", "large building"} & set(kinds)
            assert all(each & set(kinds) for _, each in named), (index, caption)
            assert sum(each != {"road"} for _, each in named) == len(buildings_named), (index, caption)
            assert buildings_named or {"road"} in [each for _, each in named], (index, caption)
            assert ("road" in kinds) == (mask == 128).any()
            assert ({"villa", "large building"} & set(kinds) != set()) == (mask == 255).any()
            if any(areas > large_area):
                assert "large building" in kinds, (index, caption)
            if len(areas) and max(areas) < 500:
                assert "villa" in kinds, (index, caption)
            for word, each in named:
                if each != {"road"}:
                    assert count_fits(word, buildings), (index, caption, buildings)
                else:  # trees and crossings cut a road into pieces or join two: the mask does not count them
                    assert count_fits(word, kinds["road"].count), (index, caption)
            for clause in clauses(caption):
                values = {128 if each == {"road"} else 255 for _, each in named_objects(clause)}
                assert not values or position_fits(clause, np.isin(mask, list(values))), (index, caption)


def test_captions_of_single_date_pairs_say_what_the_mask_shows(library):
    materials = LibraryMaterials(library)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        pair = draw_pair(materials, rng, True, SyntheticSettings())
        mask, change = pair.mask, pair.change
        kinds = {entry.kind: entry.count for entry in change.objects}
        assert sum(kinds.values()) == ndimage.label(mask)[1]
        for caption in describe(change, rng):
            named = named_objects(caption)
            assert len(named) == len(kinds) and all(each & set(kinds) for _, each in named), caption
            assert all(any(count_fits(word, kinds[kind]) for kind in each & set(kinds)) for word, each in named)
            if len(kinds) == 1:  # with two kinds the mask does not tell whose position it is
                assert position_fits(caption, mask > 0), caption


def test_composed_pairs_have_the_captions_and_changed_area_of_their_scene(library):
    dataset = SyntheticDataset(24, materials=LibraryMaterials(library), pair_mix={"composed": 1})
    for index in range(1, 24, 4):
        example, (scene, rng) = dataset[index], dataset.scene(index)
        assert example["captions"] == describe(scene.change, rng)
        assert example["image_before"].size == example["image_after"].size == example["mask"].size == (256, 256)
        drawn, shown = (scene.mask > 0).mean(), (np.asarray(example["mask"]) > 0).mean()
        assert shown == pytest.approx(drawn, rel=0.05)


@pytest.mark.parametrize("switch", RELEVANT)
def test_a_relevant_switch_alone_brings_only_its_change(switch):
    kind, way = switch.rsplit("_", 1)
    kind = {"villas": "villa", "large_buildings": "large building", "roads": "road"}[kind]
    words = {
        "appear": "appear|built|constructed|show|replaces? the|replaced by (?!bareland|trees|woods|grass)",
        "removed": "removed|disappear|demolished|replaced",
    }[way]
    dataset = SyntheticDataset(24, settings=only(switch))
    for index in range(1, 24, 2):
        _, change, captions = dataset.truth(index)
        assert [entry.kind for entry in change.objects] == [kind]
        assert change.appears == (way == "appear")
        assert all(re.search(words, caption) for caption in captions), captions


def test_without_relevant_switches_nothing_changes():
    dataset = SyntheticDataset(6, settings=only(*IRRELEVANT, image_size=128))
    for index in range(6):
        example = dataset[index]
        assert not example["changed"]
        assert not np.asarray(example["mask"]).any()
        assert example["captions"] == STOCK


def test_without_irrelevant_switches_an_unchanged_pair_is_one_image_twice():
    dataset = SyntheticDataset(11, settings=only(*RELEVANT))
    for index in range(0, 11, 2):
        example = dataset[index]
        assert example["image_before"].tobytes() == example["image_after"].tobytes()


@pytest.mark.parametrize("switch", IRRELEVANT)
def test_an_irrelevant_switch_alone_changes_the_image_but_not_the_truth(switch):
    dataset = SyntheticDataset(17, settings=only(switch))
    examples = [dataset[index] for index in range(0, 17, 2)]
    assert any(example["image_before"].tobytes() != example["image_after"].tobytes() for example in examples)
    assert not any(np.asarray(example["mask"]).any() for example in examples)


def test_the_mask_covers_what_was_built_in_the_after_image():
    still, shifted = (SyntheticDataset(16, settings=only(*RELEVANT, *extra)) for extra in ((), ("shift",)))
    for index in range(1, 16, 2):
        example, moved = still[index], shifted[index]
        before, after = (np.asarray(example[key], np.float32) for key in ("image_before", "image_after"))
        inside = ndimage.binary_erosion(np.asarray(example["mask"]) > 0, iterations=2)
        assert (np.abs(before - after).max(-1) > 8)[inside].mean() > 0.8
        assert moved["image_after"].tobytes() == example["image_after"].tobytes()  # only the before image is displaced
        assert moved["mask"].tobytes() == example["mask"].tobytes()


def test_ground_words_are_true_of_the_date_without_the_objects():
    seen = set()
    for index in range(1, 240, 2):
        scene = scene_of(SyntheticDataset(240), index)
        mask, change = scene.mask > 0, scene.change
        cover = scene.before if change.appears else scene.after
        trees = cover.trees[4:-4, 4:-4][mask].mean()
        seen.add(change.ground)
        assert (change.ground == "trees") == (trees > 0.45)
        captions = describe(change, np.random.default_rng(index))
        mentioned = {"trees": "trees|woods|forest", "bareland": "bareland|desert", "grass": "grass|meadow"}
        for ground, words in mentioned.items():
            if ground != change.ground:
                assert not any(re.search(words, caption) for caption in captions), captions
    assert seen == {"trees", "bareland", "grass", ""}


def scene_of(dataset: SyntheticDataset, index: int) -> Scene:
    rng = np.random.default_rng(np.random.SeedSequence((dataset.seed, 0, index)))
    return draw_scene(rng, index % 2 == 1, dataset.settings)


def test_content_does_not_tell_changed_from_unchanged():
    """Single images of both kinds hold the same number of buildings and roads, up to chance."""
    dataset = SyntheticDataset(600)
    contents: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for index in range(600):
        scene = scene_of(dataset, index)
        contents[index % 2] += [
            (len(scene.layout.present_buildings(state)), len(scene.layout.present_roads(state)))
            for state in scene.states
        ]
    unchanged, changed = np.mean(contents[0], 0), np.mean(contents[1], 0)
    assert changed == pytest.approx(unchanged, rel=0.2)


def test_materials_are_the_source_of_every_texture():
    colours = {"villa roof": (200, 0, 0), "asphalt": (0, 0, 200), "large roof": (200, 0, 200)}

    class Flat:
        def texture(self, kind, size, rng):
            return Image.new("RGB", (size, size), colours.get(kind, (0, 120, 0)))

        def roof(self, kind, rng):
            return None

    settings = only("villas_appear", "roads_appear")
    dataset = SyntheticDataset(8, settings=settings, materials=Flat(), pair_mix={"composed": 1})
    for index in (1, 3, 5, 7):
        example = dataset[index]
        before, after, mask = (np.asarray(example[key]) for key in ("image_before", "image_after", "mask"))
        villas = ndimage.binary_erosion(mask == 255, iterations=2)
        if villas.any():
            assert (after[villas].argmax(-1) == 0).mean() > 0.9
            assert (before[villas].argmax(-1) == 0).mean() < 0.1


def test_whole_roofs_lie_on_their_buildings_at_the_date_they_stand(monkeypatch):
    monkeypatch.setattr(painting, "REAL_ROOFS", 1)

    class Roofed(ProceduralMaterials):
        def roof(self, kind, rng):
            return Image.new("RGBA", (40, 30), (20, 30, 220, 255))

    settings = replace(only("villas_appear", "large_buildings_appear"), max_shift=0)
    dataset = SyntheticDataset(12, settings=settings, materials=Roofed(), pair_mix={"composed": 1})
    for index in range(1, 12, 2):
        example = dataset[index]
        before, after, mask = (np.asarray(example[key]) for key in ("image_before", "image_after", "mask"))
        roofs = ndimage.binary_erosion(mask == 255, iterations=3)
        assert (after[roofs].argmax(-1) == 2).mean() > 0.97
        assert (before[roofs].argmax(-1) == 2).mean() < 0.1


def test_a_roof_is_stretched_over_its_building_long_side_along_long_side():
    roof = Image.new("RGBA", (60, 20), (250, 0, 0, 255))
    roof.paste((0, 0, 250, 255), (30, 0, 60, 20))  # red left, blue right
    layout = draw_scene(np.random.default_rng(3), True, only("large_buildings_appear")).layout
    building = next(b for b in layout.buildings if b.changing)
    bounds = building.bounds
    texture = Image.new("RGB", (layout.canvas, layout.canvas))
    _lay_roof(texture, roof, replace(building, frame=Frame(130.0, 120.0, 0.7)))
    frame = Frame(130.0, 120.0, 0.7)
    along = bounds.u1 - bounds.u0 > bounds.v1 - bounds.v0

    def colour(u: float, v: float) -> tuple[int, ...]:
        x, y = frame.place((u * bounds.u1, v * bounds.v1))[0]
        return texture.getpixel((round(x), round(y)))

    ends = [(-0.8, 0.3), (0.8, -0.3)] if along else [(0.3, 0.8), (-0.3, -0.8)]
    assert [colour(*end) for end in ends] == [(250, 0, 0), (0, 0, 250)]
    outside = [(1.2, 0), (-1.2, 0), (0, 1.2), (0, -1.2)]
    assert all(colour(*place) == (0, 0, 0) for place in outside)


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (slice(0, 30), slice(0, 30), "top left corner"),
        (slice(70, 100), slice(60, 100), "bottom right corner"),
        (slice(0, 100), slice(0, 30), "left"),
        (slice(0, 20), slice(10, 90), "top"),
        (slice(40, 60), slice(35, 65), "center"),
        (slice(0, 100), slice(0, 100), ""),
        (slice(0, 100), slice(40, 60), ""),
    ],
)
def test_locate_names_the_part_of_the_image(rows, columns, expected):
    pixels = np.zeros((100, 100), bool)
    pixels[rows, columns] = True
    assert locate(pixels) == expected


def test_every_change_has_five_different_sentences():
    """The smallest set of facts still has five wordings, or `describe` would not return."""
    for kind in ("road", "villa", "large building"):
        for count in (1, 2, 5, 9):
            for appears in (True, False):
                change = Change((ObjectChange(kind, count, ""),), appears)
                assert len(set(describe(change, np.random.default_rng(0)))) == 5


def vocabulary() -> set[str]:
    dataset = SyntheticDataset(800)
    return {word for index in range(1, 800, 2) for caption in dataset.truth(index)[2] for word in caption.split()}


def test_the_vocabulary_is_small_and_levir_ccs():
    import gzip

    words = vocabulary()
    assert len(words) < 200
    if not CAPTIONS.exists():
        pytest.skip(f"{CAPTIONS.name} is not at hand")
    with gzip.open(CAPTIONS, "rt", encoding="utf-8") as file:
        real = {token for image in json.load(file)["images"] for s in image["sentences"] for token in s["tokens"]}
    assert words - {"."} <= real


def test_a_written_data_set_is_read_back(tmp_path):
    synthesize(tmp_path / "scenes", 12, seed=5, settings=SyntheticSettings(image_size=64))
    assert Image.open(tmp_path / "scenes" / "contact_sheet.png").width > 3 * 64
    for split, count in (("train", 10), ("val", 1), ("test", 1)):
        drawn = SyntheticDataset(count, split, 5, SyntheticSettings(image_size=64))
        read = LevirCCDataset(tmp_path / "scenes", split)
        assert len(read) == count
        for index in range(count):
            expected, actual = drawn[index], read[index]
            for key in ("image_before", "image_after", "mask"):
                assert actual[key].tobytes() == expected[key].tobytes()
            for key in ("captions", "changed", "filename", "split"):
                assert actual[key] == expected[key]
    entry = json.loads((tmp_path / "scenes" / "LevirCCcaptions.json").read_text())["images"][1]
    assert entry["changeflag"] == 1 and entry["filepath"] == "train"
    assert entry["sentences"][2]["sentid"] == 7 and entry["sentences"][0]["tokens"][-1] != "."


def test_drawn_shards_hold_the_drawn_pairs_and_nothing_else_is_left(tmp_path):
    settings = SyntheticSettings(image_size=64)
    synthesize_shards(tmp_path / "shards", 12, seed=5, settings=settings)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    card = (tmp_path / "shards" / "README.md").read_text()
    assert "Drawn by `kcfi data synthesize --shards` with seed 5" in card and "data convert" not in card
    drawn, read = SyntheticDataset(10, "train", 5, settings), load_pairs(str(tmp_path / "shards"), "train")
    examples = {example["filename"]: example for example in (read[index] for index in range(len(read)))}
    assert len(examples) == 10  # in another order
    for index in range(10):
        expected = drawn[index]
        actual = examples[expected["filename"]]
        assert actual["captions"] == expected["captions"] and actual["changed"] == expected["changed"]
        for key in ("image_before", "image_after", "mask"):
            assert actual[key].tobytes() == expected[key].tobytes()


def test_drawn_shards_refuse_a_folder_with_content_before_anything_is_drawn(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        synthesize_shards(tmp_path, 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_synthesize_refuses_a_folder_with_content(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        synthesize(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"'dev'.*train, val, test"):
        SyntheticDataset(1, "dev")
    with pytest.raises(ValueError, match="image_size is 32"):
        SyntheticSettings(image_size=32)
    with pytest.raises(ValueError, match="max_shift is 9"):
        SyntheticSettings(max_shift=9)
    with pytest.raises(ValueError, match="at least 10"):
        synthesize("nowhere", 9)
