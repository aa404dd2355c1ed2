"""Pairs of two real places: what changed is what stands at the developed date."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from kcfi.processing import InputError
from kcfi.training.synthetic.captions import describe
from kcfi.training.synthetic.dataset import SyntheticDataset
from kcfi.training.synthetic.developed import draw_developed, draw_two_places, whole_buildings
from kcfi.training.synthetic.layout import SyntheticSettings
from kcfi.training.synthetic.material_library import KEEP_OFF, OPEN, LibraryMaterials
from tests.training.synthetic.test_single_dates import STILL


@pytest.fixture(scope="module")
def towns(tmp_path_factory):
    """A library of two woods (dark and light green) and a grey town with red houses, one cut by the border."""
    root = tmp_path_factory.mktemp("towns")
    entries = []
    about = {"source": "made up", "licence": "CC0-1.0", "region": "all", "split": "train", "kind": "tile"}
    for name, colour in (("dark", (20, 60, 20)), ("light", (40, 110, 40))):
        Image.fromarray(np.full((600, 600, 3), colour, np.uint8)).save(root / f"{name}.png")
        entries.append({"file": f"{name}.png", "scene": "forest", **about})
    town, labels = np.full((264, 264, 3), 120, np.uint8), np.full((264, 264), OPEN, np.uint8)
    for y, x, height, width in ((40, 40, 26, 30), (150, 60, 26, 30), (120, 160, 60, 50), (220, 230, 44, 34)):
        town[y : y + height, x : x + width], labels[y : y + height, x : x + width] = (200, 40, 30), 255
    Image.fromarray(town).save(root / "town.png")
    Image.fromarray(labels).save(root / "town_labels.png")
    entries.append({"file": "town.png", "label": "town_labels.png", **about})
    (root / "materials.json").write_text(json.dumps({"sources": [], "entries": entries}))
    return LibraryMaterials(root)


def pair(towns, seed, changed, settings=STILL):
    return draw_developed(towns, np.random.default_rng(seed), changed, settings)


def test_the_mask_is_every_building_of_the_developed_date(towns):
    seen = set()
    for seed in range(12):
        drawn = pair(towns, seed, True)
        built, bare = (drawn.after, drawn.before) if drawn.change.appears else (drawn.before, drawn.after)
        red = np.asarray(built, int)
        red = red[..., 0] > red[..., 1] + 20
        assert ((drawn.mask == 255) == red).mean() > 0.99  # with the one that the border cuts; edges are blurred
        assert (np.asarray(bare).argmax(-1) == 1).all()
        counts = {entry.kind: entry.count for entry in drawn.change.objects}
        assert sum(counts.values()) == ndimage.label(drawn.mask)[1]
        assert drawn.change.ground == "trees"
        for caption in describe(drawn.change, np.random.default_rng(seed)):
            assert "bareland" not in caption and "grass" not in caption
        seen.add(drawn.change.appears)
    assert seen == {True, False}


def test_open_land_that_looks_otherwise_is_unchanged(towns):
    pairs = [pair(towns, seed, False, SyntheticSettings()) for seed in range(8)]
    assert not any(drawn.mask.any() or drawn.change.objects for drawn in pairs)
    still = [pair(towns, seed, False) for seed in range(8)]
    assert all(drawn.before.tobytes() == drawn.after.tobytes() for drawn in still)  # the switch `ground` is off


def test_what_may_not_change_stays(towns):
    settings = SyntheticSettings(**{f"{kind}_{way}": False for kind in ("villas",) for way in ("appear", "removed")})
    assert not any(pair(towns, seed, True, settings).mask.any() for seed in range(6))


def test_seams_of_a_mosaic_are_closed_and_blocks_with_gardens_are_no_buildings():
    labels = np.full((60, 60), OPEN, np.uint8)
    labels[10:40, 10:40] = 255
    labels[24:26] = KEEP_OFF
    assert whole_buildings(labels)[24:26, 12:38].all() and not whole_buildings(labels)[24:26, 45:].any()
    assert not whole_buildings(np.where(labels == OPEN, 0, labels).astype(np.uint8)).any()


def test_developed_pairs_are_a_kind_of_the_data_set(towns, library):
    dataset = SyntheticDataset(4, materials=towns, pair_mix={"developed": 1})
    example = dataset[1]
    assert example["changed"] and np.asarray(example["mask"]).any() and len(example["captions"]) == 5
    assert not dataset[2]["changed"]
    with pytest.raises(InputError, match="made of real places"):
        dataset.scene(1)
    with pytest.raises(InputError, match=r"'developed' pairs.*open land \(agricultural, chaparral, forest\)"):
        SyntheticDataset(4, materials=LibraryMaterials(library), pair_mix={"developed": 1})


def test_of_two_places_the_mask_is_what_stands_at_the_second_alone(towns):
    changed = 0
    for seed in range(12):
        drawn = draw_two_places(towns, np.random.default_rng(seed), True, STILL)
        stood, stands = (np.asarray(date, int) for date in (drawn.before, drawn.after))
        stood, stands = (image[..., 0] > image[..., 1] + 20 for image in (stood, stands))
        assert ((drawn.mask == 255) == (stands & ~stood)).mean() > 0.98  # edges are blurred
        assert ((drawn.standing) == (stands & stood)).mean() > 0.98
        changed += drawn.mask.any()
    assert changed > 6


def test_one_place_twice_is_unchanged_and_its_buildings_stand(towns):
    drawn = draw_two_places(towns, np.random.default_rng(3), False, STILL)
    assert not drawn.mask.any() and drawn.standing.any()


def test_two_places_are_pairs_without_sentences(towns):
    [first, second] = SyntheticDataset(2, materials=towns, pair_mix={"two_places": 1})
    assert (first["captions"], second["captions"]) == ([], [])
    assert (first["changed"], second["changed"]) == (False, np.asarray(second["mask"]).any())
    assert "two_places" not in {SyntheticDataset(40, materials=towns).kind(index) for index in range(40)}


def test_two_places_need_a_library_with_outlined_buildings(library):
    with pytest.raises(InputError, match="'two_places' pairs: they need a library"):
        SyntheticDataset(2, pair_mix={"two_places": 1})
    with pytest.raises(InputError, match="add a source such as Tartu"):
        SyntheticDataset(2, materials=LibraryMaterials(library), pair_mix={"two_places": 1})[0]
