"""Regions of a mask in strips, against those of the whole mask; polygons against pixels."""

from dataclasses import replace

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.features import rasterize
from scipy import ndimage

from kcfi.processing.describer_kcfi import MERGE, changed_regions
from kcfi.scenes import regions as module
from kcfi.scenes.findings import Grid
from kcfi.scenes.rasters import NewRaster
from kcfi.scenes.regions import find_regions, polygons

WIDTH, HEIGHT = 150, 260
GRID = Grid(CRS.from_epsg(32650), Affine(0.5, 0, 5e5, 0, -0.5, 4.4e6), WIDTH, HEIGHT, (0.5, 0.5))
AREAS = np.full(HEIGHT, 0.25)


@pytest.fixture
def find(tmp_path):
    """A mask and maybe percents -> its regions, and the raster of their numbers."""

    def search(mask, percent=None, areas=AREAS, least=25.0, labels=(1, 2)):
        for name, values in (("mask", mask), ("probability", np.full_like(mask, 80) if percent is None else percent)):
            with NewRaster(tmp_path / f"{name}.tif", GRID, "uint8", 255) as raster:
                raster.write(values)
        paths = [tmp_path / f"{name}.tif" for name in ("mask", "probability", "regions")]
        found = find_regions(*paths, GRID, labels, areas, least)
        with rasterio.open(paths[2]) as file:
            return found, file.read(1), polygons(paths[2], GRID)

    return search


def blobs(seed, share=0.12):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(HEIGHT, WIDTH)), 3)
    return (noise > np.quantile(noise, 1 - share)).astype(np.uint8)


@pytest.mark.parametrize("lines", [7, 64, 512])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_strips_find_the_regions_of_the_whole_mask(find, monkeypatch, lines, seed):
    monkeypatch.setattr(module, "LINES", lines)
    mask = blobs(seed, 0.06) * np.uint8(2)
    expected = changed_regions(mask)
    found, numbers, _ = find(mask)
    assert sorted((region.box, region.pixels) for region in found) == sorted((r.box, r.pixels) for r, _ in expected)
    assert [region.number for region in found] == list(range(1, len(found) + 1)) and len(found) >= 2
    assert [region.pixels for region in found] == sorted((region.pixels for region in found), reverse=True)
    by_box = {region.box: area for region, area in expected}
    for region in found:
        left, top, right, bottom = region.box
        assert np.array_equal(numbers[top:bottom, left:right] == region.number, by_box[region.box])
        assert (numbers == region.number).sum() == region.pixels
        assert region.label == 2 and region.area == region.pixels / 4


def test_a_spiral_through_many_strips_is_one_region(find, monkeypatch):
    monkeypatch.setattr(module, "LINES", 16)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for step in range(0, 60, 40):  # nested bows, open at the top, joined below
        mask[step : HEIGHT - step, step : step + 6] = mask[step : HEIGHT - step, WIDTH - step - 6 : WIDTH - step] = 1
        mask[HEIGHT - step - 6 : HEIGHT - step, step : WIDTH - step] = 1
    mask[HEIGHT - 45 :, 70:76] = 1
    found, numbers, outlines = find(mask)
    assert len(found) == 1 and found[0].pixels == (mask == 1).sum() and np.array_equal(numbers, mask)
    assert outlines[1].area == pytest.approx(found[0].area, rel=0.05)


def test_measures_are_those_of_the_pixels(find):
    mask, percent = np.zeros((HEIGHT, WIDTH), np.uint8), np.full((HEIGHT, WIDTH), 10, np.uint8)
    mask[100:120, 30:50], percent[100:120, 30:40], percent[100:120, 40:50] = 1, 60, 90
    mask[:15, 140:] = 255  # not seen
    areas = np.linspace(0.2, 0.3, HEIGHT)
    [region], numbers, _ = find(mask, percent, areas)
    assert (region.box, region.pixels, region.label) == ((30, 100, 50, 120), 400, 1)
    assert region.area == pytest.approx(20 * areas[100:120].sum()) and region.probability == pytest.approx(0.75)
    assert region.centre == (40, 110) and set(np.unique(numbers)) == {0, 1}


def test_classes_are_regions_of_their_own(find):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[100:120, 30:50], mask[100:120, 50:60] = 2, 1
    found, numbers, outlines = find(mask)
    assert [(region.label, region.area) for region in found] == [(2, 100), (1, 50)]
    assert [outlines[number].area for number in (1, 2)] == [100, 50] and numbers[110, 55] == 2


def test_regions_below_the_least_area_are_left_out(find):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:20, 10:20], mask[50:60, 50:59] = 1, 1
    assert [region.pixels for region in find(mask)[0]] == [100]
    assert [region.pixels for region in find(mask, least=22.5)[0]] == [100, 90]
    assert find(np.zeros_like(mask))[0] == [] and find(np.zeros_like(mask))[2] == {}


@pytest.mark.parametrize(("gap", "count"), [(2 * MERGE, 1), (2 * MERGE + 1, 2)])
@pytest.mark.parametrize("lines", [20, 512])
def test_small_gaps_are_bridged_across_strips_too(find, monkeypatch, gap, count, lines):
    monkeypatch.setattr(module, "LINES", lines)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:30, 10:30] = mask[30 + gap : 50 + gap, 10:30] = 1
    found, _, outlines = find(mask)
    assert len(found) == count == len(outlines)
    assert outlines[1].geom_type == ("MultiPolygon" if count == 1 else "Polygon")


@pytest.mark.parametrize("seed", range(3))
def test_polygons_are_valid_and_keep_to_the_pixels(find, seed):
    noise = np.random.default_rng(seed).random((HEIGHT, WIDTH))
    for mask in (blobs(seed), (noise > 0.6).astype(np.uint8)):  # smooth, and as ragged as can be
        found, numbers, outlines = find(mask, labels=(1,))
        assert set(outlines) == {region.number for region in found} and found
        for region in found:
            outline = outlines[region.number]
            assert outline.is_valid and not outline.is_empty
            grown = ndimage.maximum_filter(numbers == region.number, 5)
            drawn = rasterize([outline], (HEIGHT, WIDTH), transform=GRID.transform)
            assert not (drawn.astype(bool) & ~grown).any()
            if region.pixels > 400 and mask is not noise:
                assert outline.area == pytest.approx(region.area, rel=0.25)


def test_outlines_are_in_coordinates_of_the_grid(find):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[100:120, 30:50] = 1
    _, _, outlines = find(mask)
    assert outlines[1].bounds == (5e5 + 15, 4.4e6 - 60, 5e5 + 25, 4.4e6 - 50)


def test_plain_images_have_outlines_in_pixels(tmp_path, find, monkeypatch):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[100:120, 30:50] = 1
    find(mask)
    plain = replace(GRID, crs=None, transform=Affine.identity(), metres=None)
    assert polygons(tmp_path / "regions.tif", plain)[1].bounds == (30, 100, 50, 120)
