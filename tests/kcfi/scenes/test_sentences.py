"""What a sentence says of a region, where it is looked at, and the sentence of a scene."""

import numpy as np
import pytest
import rasterio
from affine import Affine
from shapely.geometry import box as rectangle

from kcfi.models import load
from kcfi.processing import Describer
from kcfi.processing.places_kcfi import tells_of_change
from kcfi.scenes.findings import Change, Grid
from kcfi.scenes.regions import Region
from kcfi.scenes.sentences import _view, kind_of, place_of, plain_sentence, scene_caption

KINDS = [
    ("a large building is built in the woods .", "building", "appeared"),
    ("two houses show up at the top .", "building", "appeared"),
    ("some villas have been constructed along the road .", "building", "appeared"),
    ("a house disappears .", "building", "removed"),
    ("several buildings have been demolished .", "building", "removed"),
    ("some trees are removed and a house is built .", "building", "appeared"),
    ("the trees are removed, and a road and some houses appear .", "road", "appeared"),
    ("a house is torn down and a road is built .", "building", "removed"),
    ("a house is torn down and a road is built .", "road", "appeared"),
    ("the woods are replaced by houses .", "building", "appeared"),
    ("two houses are replaced by bareland .", "building", "removed"),
    ("the bareland has turned into a parking lot .", "road", "appeared"),
    ("a road appears .", "building", "appeared"),  # of another class than the mask's: what it says all the same
    ("a building has changed in the north of the scene .", "building", "changed"),
    ("there is no difference .", "building", "changed"),
    ("something appears in the middle .", "change", "appeared"),
    ("xkqz .", "building", "changed"),
    ("plants are removed and a house is built .", "building", "appeared"),
    ("many buildings are built and plants are removed .", "building", "appeared"),
    ("a power plant is removed and trees are planted .", "building", "removed"),
    ("a newly built house is removed .", "building", "removed"),
    ("a new house and a road are removed .", "building", "removed"),
    ("the built houses are gone .", "building", "removed"),
    ("there is a new house .", "building", "appeared"),
    ("there are newly built houses and the trees are removed .", "building", "appeared"),
    ("some new large houses are newly built .", "building", "appeared"),
]


@pytest.mark.parametrize(("sentence", "label", "kind"), KINDS)
def test_the_kind_of_a_change_is_read_from_its_sentence(sentence, label, kind):
    assert kind_of(sentence, label) == kind


def test_every_sentence_of_drawn_pairs_has_the_kind_of_its_change():
    from kcfi.training.synthetic.dataset import SyntheticDataset

    pairs, counted = SyntheticDataset(40, seed=5), 0
    for number in range(1, 40, 2):
        kinds = {kind_of(caption, "change") for caption in pairs[number]["captions"]}
        assert len(kinds) == 1 and kinds != {"changed"}, pairs[number]["captions"]
        counted += 1
    assert counted == 20


GRID = Grid(None, Affine.identity(), 900, 600, None)


def test_places_are_compass_directions():
    names = [place_of((x, y), GRID) for y in (1, 300, 599) for x in (1, 450, 899)]
    assert names == [
        *("north-west", "north", "north-east"),
        *("west", "centre", "east"),
        *("south-west", "south", "south-east"),
    ]
    assert tells_of_change(plain_sentence("road", "east"))
    assert plain_sentence("change", "centre") == "something has changed in the centre of the scene ."


def change(label, kind, pixels, place, area=True):
    about = {"polygon": rectangle(0, 0, 1, 1), "probability": 0.9, "caption": "", "box": (0, 0, 1, 1)}
    dates = {"before": "a", "after": "b", "first_seen": "b"}
    return Change(1, label, kind, pixels=pixels, area_m2=pixels / 4 if area else None, place=place, **about, **dates)


def test_the_sentence_of_a_scene_counts_what_changed():
    changes = [change("building", "appeared", 6000, "north-east")] * 2 + [
        change("building", "appeared", 4000, "south"),
        change("road", "removed", 1000, "west"),
    ]
    assert scene_caption(changes) == (
        "4 changes: buildings appeared in 3 places (4,000 m2), mostly in the north-east; roads disappeared in 1 "
        "place (250 m2) in the west."
    )
    assert scene_caption([]) == "No change was found."
    plain = [change("change", "changed", 1200, "west", area=False), change("change", "changed", 1200, "east", False)]
    assert scene_caption(plain) == "2 changes: something changed in 2 places (2,400 px)."


def test_a_large_region_is_looked_at_where_most_of_it_is(detector, tmp_path, write_raster):
    numbers = np.zeros((600, 900), np.int32)
    numbers[100, 100:800] = 1  # a long line, and a block at its end
    numbers[100:130, 770:800] = 1
    describer = Describer(*load(str(detector)))
    with rasterio.open(write_raster(tmp_path / "regions.tif", numbers)) as file:
        left, top, right, bottom = _view(
            Region(1, 2, 1570, 1570.0, 0.9, (100, 100, 800, 130), (700, 105)), file, describer, GRID
        )
        small = _view(Region(2, 2, 100, 100.0, 0.9, (400, 300, 410, 310), (405, 305)), file, describer, GRID)
    assert (right - left, bottom - top) == (32, 32) and left >= 760 and top >= 95
    assert small == (389, 289, 421, 321)
