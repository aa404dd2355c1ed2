"""Drawn series with known truth: when each change is first seen, what flickers, what cannot be confirmed yet."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import rasterio
from PIL import Image
from shapely import box

from kcfi.models import load
from kcfi.processing import NO_LABEL, Describer, InputError
from kcfi.scenes import WORK, describe_scene
from kcfi.scenes.rasters import NewRaster
from kcfi.scenes.series import FIRST_SEEN, check_confirm, date_regions, first_seen, join, pairs, unconfirmed
from tests.kcfi.scenes.conftest import five, make_grid, save_raster

YEARS = ("2018", "2019", "2020", "2021", "2022")
SIDE, STEP = 32, 64  # px: of a site, and from one to the next
# what stands on each site at each date
SITES = {
    "built in 2019": "01111",
    "built in 2020": "00111",
    "removed in 2020": "11000",
    "a truck in 2019": "01000",
    "snow in 2021": "00010",
    "built in 2022": "00001",
    "missed in 2020": "01011",
    "never changed": "11111",
}


def place_of(number):
    """Left, top, right, bottom of a site in px."""
    left, top = number % 4 * STEP + 16, number // 4 * STEP + 16
    return left, top, left + SIDE, top + SIDE


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Files of the series: a grey texture, white where something stands."""
    folder = tmp_path_factory.mktemp("series")
    ground = np.random.default_rng(0).integers(60, 120, (2 * STEP, 4 * STEP, 3), np.uint8)
    files = []
    for date, year in enumerate(YEARS):
        image = ground.copy()
        for number, stands in enumerate(SITES.values()):
            left, top, right, bottom = place_of(number)
            if stands[date] == "1":
                image[top:bottom, left:right] = 255
        files.append(save_raster(folder / f"{year}.tif", image))
    return files


@pytest.fixture(scope="module")
def described(drawn, detector, tmp_path_factory):
    """The series described: with a number of confirmations, into one folder, so that masks are computed once."""
    describer, output = Describer(*load(str(detector)), batch_size=8), tmp_path_factory.mktemp("report")
    return lambda confirm, dates=5: describe_scene(drawn[:dates], output, describer, confirm=confirm)


def by_site(found):
    """The changes by the site that they cover; a change elsewhere, or a second one on a site, is an error."""
    placed = {}
    for change in found.changes:
        hit = [
            name
            for number, name in enumerate(SITES)
            if change.polygon.intersects(box(*_on_ground(place_of(number), found.grid)))
        ]
        assert len(hit) == 1 and hit[0] not in placed, (change.box, hit)
        placed[hit[0]] = change
    return placed


def _on_ground(place, grid):
    return *(grid.transform @ place[:2]), *(grid.transform @ place[2:])


def test_a_change_that_stays_is_first_seen_when_it_was_made_and_flicker_is_left_out(described):
    found = described(1)
    placed = by_site(found)
    assert {name: change.first_seen for name, change in placed.items()} == {
        "built in 2019": "2019",
        "built in 2020": "2020",
        "removed in 2020": "2020",
        "built in 2022": "2022",
        "missed in 2020": "2019",
    }
    for change in placed.values():  # described on the date that shows it and the one before
        assert change.after == change.first_seen and change.before == str(int(change.first_seen) - 1)
        assert change.caption and SIDE**2 <= change.pixels < (SIDE + 16) ** 2
    assert found.settings["confirm"] == 1 and len(found.shifts) == 4 and found.seen_pixels == 2 * STEP * 4 * STEP
    assert found.warnings[-1] == (
        "1 change is first seen on the last date (2022), too late to be confirmed: see first_seen."
    )


@pytest.mark.parametrize(("confirm", "flicker", "late"), [(0, 2, 0), (1, 0, 1), (2, 0, 2), (3, 0, 3)])
def test_flicker_is_counted_with_and_without_confirmation(described, confirm, flicker, late):
    found = described(confirm)
    placed = by_site(found)
    assert sum(name in placed for name in ("a truck in 2019", "snow in 2021")) == flicker
    assert {"built in 2019", "built in 2020", "removed in 2020", "built in 2022"} <= set(placed)
    assert "never changed" not in placed
    told = [warning for warning in found.warnings if "too late" in warning]
    expected = {1: "1 change is first seen on the last date (2022)", 2: "first seen on the last 2 dates (2021, 2022)"}
    assert len(told) == (late > 0) and expected.get(late, "") in "".join(told)


def test_of_two_dates_all_is_as_without_a_series(described):
    found = described(1, 2)
    assert "confirm" not in found.settings and not any("confirmed" in warning for warning in found.warnings)
    assert {name: change.first_seen for name, change in by_site(found).items()} == dict.fromkeys(
        ("built in 2019", "a truck in 2019", "missed in 2020"), "2019"
    )


def test_a_later_date_that_is_added_computes_its_own_comparisons_only(drawn, detector, tmp_path, monkeypatch):
    described = Describer(*load(str(detector)), batch_size=8)
    describe_scene(drawn[:3], tmp_path, described)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / WORK).glob("*/strips/*.npz")}
    assert {path.parts[-3] for path in kept} == {"1-2", "1-3", "2-3"}
    four = describe_scene(drawn[:4], tmp_path, described)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert describe_scene(drawn[:4], tmp_path / "at once", described) == four
    for name in ("mask.tif", "changes.gpkg", "summary.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()


def test_every_date_is_aligned_with_the_first(tmp_path, detector, texture):
    ground = texture(300, 300)
    corners = [(10, 10), (12, 10), (10, 14)]  # where each date begins, down and across
    dates = [
        save_raster(tmp_path / f"{number}.tif", ground[top : top + 256, left : left + 256])
        for number, (top, left) in enumerate(corners)
    ]
    describer = Describer(*load(str(detector)), batch_size=8)
    found = describe_scene(dates, tmp_path / "as they are", describer, max_captions=0)
    assert [(shift.x, shift.y) for shift in found.shifts] == [
        pytest.approx(moved, abs=0.1) for moved in ((0, -2), (-4, 0))
    ]
    assert "2.tif lies 4.0 px from" in "".join(found.warnings)
    aligned = describe_scene(dates, tmp_path / "aligned", describer, max_captions=0, align=True)
    assert all(shift.aligned for shift in aligned.shifts) and len(aligned.warnings) == 1
    for folder, alike in (("as they are", False), ("aligned", True)):
        pictures = [np.asarray(Image.open(tmp_path / folder / WORK / f"date-{k}.png"), int) for k in range(3)]
        for later in pictures[1:]:
            assert (np.abs(later - pictures[0])[8:-8, 8:-8].mean() < 2) == alike


def test_pairs_are_all_with_the_first_and_with_the_one_before():
    assert pairs(2) == [(0, 1)]
    assert Counter(pairs(4)) == Counter([(0, 1), (0, 2), (0, 3), (1, 2), (2, 3)])


@pytest.mark.parametrize("confirm", [0, 1, 2, 3])
def test_first_seen_is_the_first_date_that_enough_later_ones_confirm(confirm):
    every = np.array([[int(bit) for bit in f"{number:04b}"] for number in range(16)], bool).T[:, None]
    for marks, first in zip(every[:, 0].T, first_seen(every, confirm)[0], strict=True):
        fitting = [
            date for date in range(1, 5) if marks[date - 1] and marks[date:].sum() >= min(confirm, len(marks[date:]))
        ]
        assert first == min(fitting, default=0), marks


def write(folder, grid, **rasters):
    folder.mkdir()
    for name, values in rasters.items():
        with NewRaster(folder / f"{name}.tif", grid, "uint8", NO_LABEL) as file:
            file.write(values)


@pytest.fixture
def comparisons(tmp_path):
    """Folders of the comparisons of three dates, 600 lines high, that is two strips: a road first, then a building."""
    grid, folders = make_grid(40, 600), {}
    masks = {(0, 1): (0, 300, 1), (0, 2): (0, 600, 2), (1, 2): (320, 600, 2)}
    for pair, (top, bottom, label) in masks.items():
        mask, percent = np.zeros((600, 40), np.uint8), np.full((600, 40), 10 * pair[1], np.uint8)
        mask[top:bottom, 10:30] = label
        mask[:, :5] = percent[:, :5] = NO_LABEL if pair == (0, 1) else 1
        folders[pair] = tmp_path / f"{pair}"
        write(folders[pair], grid, mask=mask, probability=percent)
    return grid, folders


def read(path):
    with rasterio.open(path) as file:
        return file.read(1)


def test_class_and_probability_are_those_of_the_date_that_shows_a_change_first(comparisons, tmp_path):
    grid, folders = comparisons
    assert join([folders[0, 1], folders[0, 2]], grid, 1, tmp_path) == 35 * 600
    mask, percent, dates = (read(tmp_path / name) for name in ("mask.tif", "probability.tif", FIRST_SEEN))
    assert (mask[:300, 10:30] == 1).all() and (mask[300:, 10:30] == 2).all() and not mask[:, 30:].any()
    assert (percent[:300, 10:30] == 10).all() and (percent[300:, 10:30] == 20).all() and (percent[:, 30:] == 20).all()
    assert (dates[:300, 10:30] == 1).all() and (dates[300:, 10:30] == 2).all() and not dates[:, 30:].any()
    assert (mask[:, :5] == NO_LABEL).all() and (percent[:, :5] == NO_LABEL).all() and not dates[:, :5].any()


def test_most_pixels_of_a_region_decide_on_its_dates(comparisons, tmp_path):
    grid, folders = comparisons
    join([folders[0, 1], folders[0, 2]], grid, 1, tmp_path)
    numbers = np.zeros((600, 40), np.int32)
    numbers[:301, 10:30], numbers[301:, 10:20], numbers[301:345, 20:30] = 1, 2, 3
    with NewRaster(tmp_path / "regions.tif", replace(grid, crs=None), "int32", by_lines=True) as file:
        file.write(numbers)
    # 2 is marked by the successive dates too; of 3 they mark 25 of 44 lines
    assert date_regions(tmp_path / "regions.tif", 3, folders, grid, tmp_path) == [(0, 1), (1, 2), (1, 2)]
    numbers[337:345, 20:30] = 0  # now 17 of 36
    with NewRaster(tmp_path / "regions.tif", replace(grid, crs=None), "int32", by_lines=True) as file:
        file.write(numbers)
    assert date_regions(tmp_path / "regions.tif", 3, folders, grid, tmp_path) == [(0, 1), (1, 2), (0, 2)]


def test_how_many_confirmations_there_can_be_is_checked():
    for confirm, dates in ((0, 2), (1, 2), (1, 3), (2, 4)):
        check_confirm(confirm, dates)
    for confirm, dates in ((-1, 2), (2, 3), (3, 4)):
        with pytest.raises(InputError, match=rf"confirm={confirm}: of {dates} dates 0 to {dates - 2} can confirm"):
            check_confirm(confirm, dates)


def test_no_warning_where_all_is_confirmed():
    found = five()
    assert unconfirmed(found.changes, found.dates, 0) == [] and unconfirmed((), found.dates, 1) == []
    assert unconfirmed(found.changes, found.dates, 1)[0].startswith("5 changes are first seen on the last date (2021)")
