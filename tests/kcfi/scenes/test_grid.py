"""The common grid of dates: its place, its pixels, and the pairs that are refused."""

import math
import re

import numpy as np
import pytest
from affine import Affine
from rasterio.crs import CRS

from kcfi.processing import InputError
from kcfi.scenes.findings import Grid
from kcfi.scenes.grid import ground_metres, is_north_up, name_of, pixel_areas, scene_grid
from kcfi.scenes.reading import open_raster

LOCAL = 'LOCAL_CS["site",UNIT["metre",1]]'
FEET = 'LOCAL_CS["site in feet",UNIT["foot",0.3048]]'


@pytest.fixture
def grid_of(tmp_path, write_raster):
    """Rasters, each (width, height, crs, transform), -> their grid."""

    def build(*rasters, resolution=0.5, reproject=False):
        paths = [
            write_raster(tmp_path / f"{number}.tif", np.zeros((height, width, 3), np.uint8), crs, transform)
            for number, (width, height, crs, transform) in enumerate(rasters)
        ]
        return scene_grid([open_raster(path) for path in paths], resolution, reproject)

    return build


def at(x, y, step=0.5):
    return Affine(step, 0, x, 0, -step, y)


def test_dates_of_one_grid_keep_it(grid_of):
    grid = grid_of(*[(50, 40, "EPSG:32650", at(5e5, 4.4e6))] * 2)
    assert (grid.width, grid.height, grid.metres) == (50, 40, (0.5, 0.5)) and name_of(grid.crs) == "EPSG:32650"
    assert grid.transform == at(5e5, 4.4e6)


def test_the_grid_is_what_both_dates_cover_in_pixels_of_the_first(grid_of):
    first, second = (50, 40, "EPSG:32650", at(5e5, 4.4e6)), (50, 40, "EPSG:32650", at(5e5 + 5.25, 4.4e6 - 2.5))
    grid = grid_of(first, second)
    assert (grid.width, grid.height) == (39, 35)  # 39.5 px in common, of which 39 are whole ones of the first date
    assert grid.transform == at(5e5 + 5.5, 4.4e6 - 2.5)


def test_pixels_are_as_large_as_those_that_the_model_was_trained_on(grid_of):
    grid = grid_of((100, 60, "EPSG:32650", at(5e5, 4.4e6, 0.3)), (200, 200, "EPSG:32650", at(5e5, 4.4e6, 0.15)))
    assert grid.metres == (0.5, 0.5) and (grid.width, grid.height) == (60, 36) and grid.transform == at(5e5, 4.4e6)
    assert grid_of(*[(100, 60, "EPSG:32650", at(5e5, 4.4e6, 0.502))] * 2).transform.a == 0.502  # near enough


@pytest.mark.parametrize("latitude", [0, 40, 70])
def test_in_degrees_a_pixel_is_as_long_on_the_ground_both_ways(grid_of, latitude):
    step = 0.3 / 111_000
    grid = grid_of(*[(200, 100, "EPSG:4326", Affine(step, 0, 116, 0, -step, latitude))] * 2)
    assert grid.metres == pytest.approx((0.5, 0.5))
    assert grid.transform.a * math.cos(math.radians(latitude)) == pytest.approx(-grid.transform.e, rel=0.01)
    assert grid.width * grid.transform.a == pytest.approx(200 * step, rel=0.02)
    assert pixel_areas(grid) == pytest.approx(0.25, rel=1e-4)


def test_the_area_of_a_pixel_in_degrees_is_that_at_its_row():
    step = 0.01
    grid = Grid(CRS.from_epsg(4326), Affine(step, 0, 10, 0, -step, 60), 10, 1000, None)
    areas = pixel_areas(grid)
    latitudes = np.radians(60 - step * (np.arange(1000) + 0.5))
    sphere = (6_371_000 * np.radians(step)) ** 2 * np.cos(latitudes)
    assert areas == pytest.approx(sphere, rel=0.01) and areas[-1] > 1.25 * areas[0]


@pytest.mark.parametrize(("wkt", "metres"), [(LOCAL, 1), (FEET, 0.3048)])
def test_a_local_crs_has_the_length_of_its_unit(grid_of, wkt, metres):
    assert ground_metres(CRS.from_wkt(wkt), 0, 0) == (metres, metres)
    grid = grid_of(*[(60, 60, wkt, at(0, 0, 0.5 / metres))] * 2)
    assert (grid.width, grid.height) == (60, 60) and pixel_areas(grid) == pytest.approx(0.25)


def test_web_mercator_is_measured_on_the_ground(grid_of):
    grid = grid_of(*[(100, 100, "EPSG:3857", at(0, 8_399_738))] * 2)  # 60 degrees north, where a unit is half a metre
    assert grid.metres == pytest.approx((0.5, 0.5)) and (grid.width, grid.height) == pytest.approx((50, 50), abs=1)
    assert pixel_areas(grid) == pytest.approx(0.25, rel=0.01)
    assert ground_metres(CRS.from_epsg(32650), 5e5, 4.4e6) == (1, 1)  # to 0.04 %: a map's own metres


@pytest.mark.parametrize(("crs", "x", "y"), [("EPSG:32601", 166_021.44, 0), ("EPSG:3832", 3_339_584.72, 0)])
def test_metres_are_the_same_across_the_antimeridian(crs, x, y):
    crs = CRS.from_string(crs)
    here, there = (ground_metres(crs, x + step, y) for step in (-5, 100))
    assert here == pytest.approx(there, rel=1e-3)
    grid = Grid(crs, at(x - 5 - 5, y + 5), 20, 20, None)
    assert pixel_areas(grid) == pytest.approx(0.25 * here[0] * here[1], rel=0.01)


def test_a_rotated_first_date_gets_a_grid_that_is_north_up(grid_of):
    rotated = at(5e5, 4.4e6) @ Affine.rotation(30)
    grid = grid_of(*[(80, 80, "EPSG:32650", rotated)] * 2)
    assert is_north_up(grid.transform) and not is_north_up(rotated)
    assert grid.width == grid.height == int(80 * (math.cos(math.pi / 6) + math.sin(math.pi / 6)))


def test_plain_images_have_the_grid_of_their_pixels(grid_of):
    grid = grid_of(*[(30, 20, None, None)] * 2)
    assert (grid.crs, grid.width, grid.height, grid.metres) == (None, 30, 20, None)
    assert grid.transform == Affine.identity() and pixel_areas(grid) is None


REFUSED = {
    "in EPSG:32650, .* in EPSG:32633: if both are right, --reproject": [
        (50, 40, "EPSG:32650", at(5e5, 4.4e6)),
        (50, 40, "EPSG:32633", at(5e5, 4.4e6)),
    ],
    "have no ground in common": [
        (50, 40, "EPSG:32650", at(5e5, 4.4e6)),
        (50, 40, "EPSG:32650", at(5e5 + 25, 4.4e6)),
    ],
    "have less than a pixel of 0.5 m in common": [
        (50, 40, "EPSG:32650", at(5e5, 4.4e6)),
        (50, 40, "EPSG:32650", at(5e5 + 24.8, 4.4e6)),
    ],
    "has no coordinate reference system, but": [(50, 40, "EPSG:32650", at(5e5, 4.4e6)), (50, 40, None, None)],
    "50 x 40 px, .* 50 x 41 px": [(50, 40, None, None), (50, 41, None, None)],
}


@pytest.mark.parametrize("message", REFUSED)
def test_dates_that_cannot_be_compared_are_one_error_that_names_both(grid_of, message):
    for rasters in (REFUSED[message], REFUSED[message][::-1] if "32633" not in message else REFUSED[message]):
        with pytest.raises(InputError, match=message if rasters is REFUSED[message] else None) as error:
            grid_of(*rasters)
        assert re.search(r"0\.tif.*1\.tif|1\.tif.*0\.tif", str(error.value))


def test_other_zones_that_are_reprojected_but_lie_apart_are_refused_too(grid_of):
    with pytest.raises(InputError, match=r"0\.tif and .*1\.tif have no ground in common"):
        grid_of((50, 40, "EPSG:32650", at(5e5, 4.4e6)), (50, 40, "EPSG:32633", at(5e5, 4.4e6)), reproject=True)


def test_places_without_a_crs_are_not_taken_for_pixels_if_they_differ(tmp_path, write_raster):
    paths = [write_raster(tmp_path / f"{x}.tif", np.zeros((9, 9), np.uint8), None, transform=None) for x in (0, 5)]
    for path, x in zip(paths, (0, 5), strict=True):
        path.with_suffix(".tfw").write_text(f"0.5\n0\n0\n-0.5\n{x}\n9\n")
    with pytest.raises(InputError, match=r"0\.tif and .*5\.tif lie at different places"):
        scene_grid([open_raster(path) for path in paths], 0.5)
