"""Dates on one grid -> rasters, regions and sentences: what lies where, and what is refused."""

import numpy as np
import pytest
import rasterio
import torch

from kcfi.models import load
from kcfi.processing import NO_LABEL, Describer, InputError
from kcfi.scenes.compare import compare, mark
from kcfi.scenes.grid import scene_grid
from kcfi.scenes.kept import Kept
from kcfi.scenes.reading import Layer, open_raster

SQUARES = [(8, 8, 40, 40), (8, 72, 24, 88)]  # px; the second one is smaller


@pytest.fixture
def layers(tmp_path, write_raster, make_pair):
    """Three dates of 64 x 96 px without their last 8 columns: a square more on each."""
    pixels = np.array(make_pair(64, 96)[0])
    found = []
    for number in range(3):
        image = pixels.copy()
        for left, top, right, bottom in SQUARES[:number]:
            image[top:bottom, left:right] = 255
        image[:, 56:] = 0
        source = open_raster(write_raster(tmp_path / f"{number}.tif", image, nodata=0))
        found.append(Layer(source, scene_grid([source], 0.5)))
    return found


@pytest.fixture
def describer(detector):
    return Describer(*load(str(detector)))


def found_by(describer, layers, work, **settings):
    given = {"least": 25, "most_captions": None, "confirm": 1, **settings}
    return compare(describer, layers, work, {}, list(range(len(layers))), [1, 2], **given)


def test_two_dates_leave_their_rasters_in_the_folder_itself(layers, describer, tmp_path):
    found = found_by(describer, layers[1:], tmp_path / "work")
    assert found.seen == 56 * 96 and found.shown == [(0, 1)]
    [region] = found.regions
    assert list(found.outlines) == list(found.sentences) == [1] and found.sentences[1]
    names = {path.name for path in (tmp_path / "work").iterdir()}
    assert names == {"mask.tif", "probability.tif", "regions.tif", "strips", "sentences"}
    with rasterio.open(tmp_path / "work/regions.tif") as numbers:
        assert (numbers.read(1) == 1).sum() == region.pixels >= 16 * 16


def test_what_is_kept_is_of_one_grid_one_precision_and_one_pair(layers, describer, tmp_path, capsys):
    found_by(describer, layers[1:], tmp_path)
    found_by(describer, layers[1:], tmp_path, least=26)  # other regions of the same mask
    assert "started anew" not in capsys.readouterr().err
    for other in (Describer(describer.model, describer.processor, autocast=torch.bfloat16), describer):
        found_by(other, layers[1:], tmp_path)
        assert "started anew" in capsys.readouterr().err


def test_each_region_is_described_on_the_dates_that_show_it(layers, describer, tmp_path):
    found = found_by(describer, layers, tmp_path)
    assert found.shown == [(0, 1), (1, 2)] and found.seen == 56 * 96
    assert {path.name for path in tmp_path.glob("*-*")} == {"1-2", "1-3", "2-3"}
    assert list(found.sentences) == [1, 2]
    alone = found_by(describer, layers[1:], tmp_path / "alone")
    assert alone.sentences[1] == found.sentences[2]  # the same two dates, the same tile
    few = found_by(describer, layers, tmp_path, most_captions=1)
    assert few.sentences == {1: found.sentences[1]} and few.shown == found.shown


def test_the_mask_of_a_pair_is_that_of_both_dates_data(layers, describer, tmp_path):
    kept = Kept(tmp_path / "strips", {})
    assert mark(describer, layers[0], layers[1], tmp_path, kept) == 56 * 96
    for name in ("mask", "probability"):
        with rasterio.open(tmp_path / f"{name}.tif") as file:
            assert ((file.read(1) == NO_LABEL) == (np.arange(64) >= 56)).all()


def test_dates_without_common_data_are_refused_by_name(layers, describer, tmp_path, write_raster):
    empty = Layer(
        open_raster(write_raster(tmp_path / "empty.tif", np.zeros((96, 64, 3), np.uint8), nodata=0)), layers[0].grid
    )
    with pytest.raises(InputError, match=r"0\.tif and .*empty\.tif have no pixel with data on both"):
        mark(describer, layers[0], empty, tmp_path, Kept(tmp_path / "strips", {}))
    halves = []
    for half in (np.s_[:, :32], np.s_[:, 32:]):  # each has data where the first has, but not where the other has
        pixels = layers[1].read((0, 0, 64, 96))[0]
        pixels[half] = 0
        path = write_raster(tmp_path / f"half{len(halves)}.tif", pixels, nodata=0)
        halves.append(Layer(open_raster(path), layers[0].grid))
    with pytest.raises(InputError, match=r"half0\.tif and .*half1\.tif have no pixel"):
        found_by(describer, [layers[0], *halves], tmp_path / "halves")
