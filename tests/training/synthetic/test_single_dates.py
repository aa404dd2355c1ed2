import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from kcfi.training.synthetic import single_dates
from kcfi.training.synthetic.captions import describe
from kcfi.training.synthetic.dataset import SyntheticDataset
from kcfi.training.synthetic.layout import SyntheticSettings, crop
from kcfi.training.synthetic.material_library import LibraryMaterials
from kcfi.training.synthetic.single_dates import draw_pair, removable_buildings
from tests.training.synthetic.test_dataset import named_objects

IRRELEVANT = ("light", "season", "trees", "shadows", "cars", "noise", "blur", "shift", "ground")
STILL = SyntheticSettings(**dict.fromkeys(IRRELEVANT, False), max_shift=0)


def pairs_of(library, changed, settings=STILL, count=12):
    materials = LibraryMaterials(library)
    return [draw_pair(materials, np.random.default_rng(seed), changed, settings) for seed in range(count)]


def test_an_unchanged_pair_is_the_same_place_twice(library):
    for pair in pairs_of(library, changed=False):
        assert pair.before.tobytes() == pair.after.tobytes()
        assert not pair.mask.any() and not pair.change.objects


def test_a_changed_pair_differs_at_its_buildings_and_hardly_elsewhere(library):
    for pair in pairs_of(library, changed=True):
        assert pair.mask.any() and pair.change.objects
        difference = np.abs(np.asarray(pair.before, int) - np.asarray(pair.after, int)).sum(-1)
        assert (difference[pair.mask > 0] > 30).mean() > 0.95
        assert not difference[ndimage.distance_transform_edt(pair.mask == 0) > 9].any()
        assert not difference[pair.standing].any()


def test_buildings_appear_when_the_after_date_has_them(library):
    seen = set()
    for pair in pairs_of(library, changed=True, count=24):
        roofs = [np.asarray(image)[pair.mask > 0][:, 0].mean() for image in (pair.before, pair.after)]
        assert (roofs[1] > roofs[0]) == pair.change.appears
        seen.add(pair.change.appears)
    assert seen == {True, False}


def test_a_relevant_switch_that_is_off_never_happens(library):
    settings = replace(STILL, villas_removed=False, large_buildings_removed=False)
    assert all(pair.change.appears for pair in pairs_of(library, changed=True, settings=settings, count=24))
    settings = replace(STILL, villas_appear=False, villas_removed=False)
    assert not any(pair.mask.any() for pair in pairs_of(library, changed=True, settings=settings))


def test_ground_comes_and_goes_without_entering_the_mask(library):
    pairs = pairs_of(library, changed=False, settings=replace(STILL, ground=True), count=16)
    assert any(pair.before.tobytes() != pair.after.tobytes() for pair in pairs)
    assert not any(pair.mask.any() for pair in pairs)


def place_of(monkeypatch, **boxes):
    """Let every pair show one green place with red buildings at these boxes: top, left, height, width."""
    labels, place = np.zeros((264, 264), np.uint8), np.full((264, 264, 3), (60, 120, 60), np.uint8)
    for top, left, height, width in boxes.values():
        labels[top : top + height, left : left + width] = 255
    place[labels == 255] = (200, 40, 30)
    buildings = removable_buildings(labels)
    assert len(buildings) == len(boxes)
    monkeypatch.setattr(single_dates, "_draw_place", lambda *_: (Image.fromarray(place), labels, buildings))
    return buildings


def test_erased_buildings_alone_do_not_tell_changed_from_unchanged(library, monkeypatch):
    """In unchanged pairs too, roofs of a place are gone, at both dates; they no longer count as standing."""
    buildings = place_of(monkeypatch, first=(60, 60, 26, 30), second=(150, 150, 26, 30))
    seen = set()
    for pair in pairs_of(library, changed=False, count=40):
        assert pair.before.tobytes() == pair.after.tobytes()
        pixels = np.asarray(pair.after, int)
        red = pixels[..., 0] > 1.5 * pixels[..., 1]
        there = [number for number, building in enumerate(buildings) if red[crop(building.pixels)].mean() > 0.9]
        expected = sum((crop(buildings[number].pixels) for number in there), np.zeros((256, 256), np.bool_))
        assert np.array_equal(pair.standing, expected)
        seen.add(tuple(there))
    assert seen == {(), (0,), (1,), (0, 1)}


def test_captions_name_kinds_and_the_ground_that_the_bare_date_shows(library, monkeypatch):
    place_of(monkeypatch, villa=(40, 40, 26, 30), large=(150, 150, 44, 40))
    seen = set()
    for seed, pair in enumerate(pairs_of(library, changed=True, count=60)):
        kinds = {entry.kind: entry.count for entry in pair.change.objects}
        areas = np.bincount(ndimage.label(pair.mask)[0].ravel())[1:]
        sizes = {"villa" if area < 1000 else "large building" for area in areas}
        assert kinds == dict.fromkeys(sizes, 1)
        bare = np.asarray(pair.before if pair.change.appears else pair.after)[pair.mask > 0].mean(0)
        ground = pair.change.ground
        if ground:
            assert ("grass" if bare[1] > bare[0] else "bareland") == ground, bare
        for caption in describe(pair.change, np.random.default_rng(seed)):
            assert len(named_objects(caption)) == len(kinds), caption
            assert all(each & set(kinds) for _, each in named_objects(caption)), caption
            said = re.sub("meadow", "grass", re.sub("desert", "bareland", caption))
            assert all(word in ("", ground) for word in re.findall("grass|bareland|trees", said)), caption
        seen.add((*sorted(kinds), ground))
    assert {one[-1] for one in seen} == {"", "grass", "bareland"}
    assert {one[:-1] for one in seen} == {("villa",), ("large building",), ("large building", "villa")}


@pytest.mark.parametrize("cut", ["by the border", "by what is unknown"])
def test_buildings_that_may_go_on_are_not_named(cut):
    labels = np.zeros((264, 264), np.uint8)
    labels[100:126, 100:130] = 255
    if cut == "by the border":
        labels[0:40, 0:34] = 255  # the corner of a block
    else:
        labels[20:50, 20:40], labels[20:50, 40:60] = 255, 64
    (found,) = removable_buildings(labels)
    assert found.pixels[100, 100] and found.kind == "villa"


def test_houses_that_form_a_block_are_not_counted_as_one():
    labels = np.zeros((264, 264), np.uint8)
    labels[30:240, 30:240] = 255
    labels[8:24, 60:90] = 255
    assert [b.kind for b in removable_buildings(labels)] == ["villa"]


def test_single_date_pairs_are_a_pure_function_of_seed_and_index(library):
    def example(index):
        dataset = SyntheticDataset(9, seed=3, materials=LibraryMaterials(library), pair_mix={"single_date": 1})
        assert dataset.kind(index) == "single_date"
        return dataset[index]

    first, again = example(5), example(5)
    assert first["image_after"].tobytes() == again["image_after"].tobytes()
    assert first["captions"] == again["captions"]
    assert first["image_before"].size == first["mask"].size == (256, 256)


def test_a_mix_holds_every_kind_in_its_share(library):
    mix = {"drawn": 1, "composed": 2, "single_date": 1}
    dataset = SyntheticDataset(400, materials=LibraryMaterials(library), pair_mix=mix)
    kinds = [dataset.kind(index) for index in range(400)]
    assert {kind: kinds.count(kind) / 400 for kind in mix} == pytest.approx(
        {"drawn": 0.25, "composed": 0.5, "single_date": 0.25}, abs=0.06
    )


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"composed": 1}, "need a library"),
        ({"single_date": 1}, "need a library of .* with labelled tiles of split 'train'"),
        ({"real": 1}, "no kind 'real': choose among drawn, composed, single_date"),
        ({"drawn": 0}, "one of them above"),
        ({"drawn": 2, "composed": -1}, "at least 0"),
        ({"drawn": float("nan")}, "at least 0"),
    ],
)
def test_a_mix_that_cannot_be_drawn_is_refused(mix, message):
    with pytest.raises(ValueError, match=message):
        SyntheticDataset(4, pair_mix=mix)
