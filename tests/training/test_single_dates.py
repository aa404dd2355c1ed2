import numpy as np
import pytest
from PIL import Image

from kcfi.training.material_library import LibraryMaterials
from kcfi.training.single_dates import draw_pair, removable_buildings
from kcfi.training.synthetic import SyntheticDataset
from kcfi.training.synthetic_layout import SyntheticSettings

IRRELEVANT = ("light", "season", "trees", "shadows", "cars", "noise", "blur", "shift", "ground")
STILL = SyntheticSettings(**dict.fromkeys(IRRELEVANT, False), max_shift=0)


def pairs_of(library, changed, settings=STILL, count=12):
    materials = LibraryMaterials(library)
    return [draw_pair(materials, np.random.default_rng(seed), changed, settings) for seed in range(count)]


def test_an_unchanged_pair_is_the_same_place_twice(library):
    for before, after, mask, change in pairs_of(library, changed=False):
        assert before.tobytes() == after.tobytes()
        assert not mask.any() and not change.objects


def test_a_changed_pair_differs_at_its_buildings_and_hardly_elsewhere(library):
    for before, after, mask, change in pairs_of(library, changed=True):
        assert mask.any() and change.objects
        difference = np.abs(np.asarray(before, int) - np.asarray(after, int)).sum(-1)
        assert (difference[mask > 0] > 60).mean() > 0.95
        near = np.asarray(Image.fromarray(mask).resize((32, 32), Image.Resampling.BOX).resize((256, 256))) > 0
        assert difference[~near].mean() < 1


def test_buildings_appear_when_the_after_date_has_them(library):
    seen = set()
    for before, after, mask, change in pairs_of(library, changed=True, count=24):
        roofs = [np.asarray(image)[mask > 0][:, 0].mean() for image in (before, after)]
        assert (roofs[1] > roofs[0]) == change.appears
        seen.add(change.appears)
    assert seen == {True, False}


def test_ground_comes_and_goes_without_entering_the_mask(library):
    settings = SyntheticSettings(**{**dict.fromkeys(IRRELEVANT, False), "ground": True}, max_shift=0)
    pairs = [pair for pair in pairs_of(library, changed=False, settings=settings, count=16)]
    assert any(before.tobytes() != after.tobytes() for before, after, _, _ in pairs)
    assert not any(mask.any() for _, _, mask, _ in pairs)


def test_touching_houses_that_form_a_block_are_not_counted_as_one():
    labels = np.zeros((264, 264), np.uint8)
    labels[20:250, 20:250] = 255  # a block of 13,225 m2
    labels[2:18, 60:90] = 255
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
        ({"composed": 1}, "needs? a library"),
        ({"real": 1}, "no kind 'real': choose among drawn, composed, single_date"),
        ({"drawn": 0}, "one of them above"),
        ({"drawn": 2, "composed": -1}, "at least 0"),
    ],
)
def test_a_mix_that_cannot_be_drawn_is_refused(mix, message):
    with pytest.raises(ValueError, match=message):
        SyntheticDataset(4, pair_mix=mix)
