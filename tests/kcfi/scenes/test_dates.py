"""Names of dates, and warnings of what they are."""

import os
from types import SimpleNamespace

import pytest
from affine import Affine
from rasterio.crs import CRS

from kcfi.processing import InputError
from kcfi.scenes.dates import check_acquired, coarse_dates, describe_dates, far_dates, fingerprint, unordered_dates
from kcfi.scenes.findings import Date, Shift


def test_dates_have_names_that_differ():
    def names(*paths, acquired=(), said=""):
        tags = {"ACQUISITIONDATETIME": said} if said else {}
        silent, layer = SimpleNamespace(tags=lambda ns: tags), SimpleNamespace(notes=[])
        dates = describe_dates(paths, [silent] * len(paths), [layer] * len(paths), acquired)
        return [date.name for date in dates]

    assert names("x/before.tif", "x/after.tif") == ["before", "after"]
    assert names("A/test_1.tif", "B/test_1.tif") == ["A/test_1", "B/test_1"]
    assert names("x.tif", "x.tif") == ["date 1", "date 2"]
    assert names("a.tif", said="2019-06-01 10:12:13") == ["2019-06-01"]
    assert names("a.tif", said="01/06/2019") == ["a"]  # no date
    assert names("a.tif", "b.tif", acquired=["2019-06-01", "2024-05-30"]) == ["2019-06-01", "2024-05-30"]


def test_no_report_shows_what_a_url_is_signed_with():
    at = CRS.from_epsg(32650), Affine(2, 0, 5e5, 0, -2, 4.4e6)
    signed = "/vsicurl/https://images.example/x/a.tif?sig=secret/of.mine&t=1"
    urls = [signed, "https://images.example/y/b.tif?sig=secret"]
    sources = [
        SimpleNamespace(name=u, tags=lambda ns: {}, crs=at[0], transform=at[1], width=9, height=9) for u in urls
    ]
    dates = describe_dates(urls, sources, [SimpleNamespace(notes=[])] * 2, ())
    assert [date.path for date in dates] == [
        "/vsicurl/https://images.example/x/a.tif",
        "https://images.example/y/b.tif",
    ]
    assert [date.name for date in dates] == ["a", "b"]
    warnings = coarse_dates(sources, 0.5) + far_dates(urls, Shift(3, -4, 0.2, 9))
    assert len(warnings) == 3 and "secret" not in " ".join(warnings)
    local = "folder/what?.tif"
    assert describe_dates([local], sources[:1], [SimpleNamespace(notes=[])], ())[0].path == local


def test_when_images_were_acquired_is_checked_before_anything_else_is_done():
    check_acquired((), 2)
    check_acquired(["2019-06-01", "2024-05-30T10:12:13Z"], 2)
    with pytest.raises(InputError, match="acquired names 1 dates for 2 images: give one each"):
        check_acquired(["2019-06-01"], 2)
    for wrong in ("30.05.2024", "2024-13-01", "summer", ""):
        with pytest.raises(InputError, match=f"acquired: '{wrong}' is no date in ISO 8601, as 2021-05-30"):
            check_acquired(["2019-06-01", wrong], 2)


def test_images_that_are_not_in_order_of_time_are_warned_of():
    def told(*days):
        return "".join(unordered_dates([Date("a.tif", "a", day) for day in days]))

    assert told("2019-06-01", "2024-05-30") == told("2019-06-01", "", "2019-06-01T10:00:00Z") == told("", "") == ""
    assert "(2024-05-30, 2019-06-01)" in told("2024-05-30T23:00:00+02:00", "", "2019-06-01")


@pytest.mark.parametrize(("step", "warned"), [(0.5, False), (0.74, False), (0.76, True), (10, True)])
def test_what_is_coarser_than_the_training_images_is_warned_of(step, warned):
    about = {"crs": CRS.from_epsg(32650), "width": 10, "height": 10, "name": "a.tif"}
    source = SimpleNamespace(transform=Affine(step, 0, 5e5, 0, -step, 4.4e6), **about)
    warnings = coarse_dates([source], 0.5)
    assert bool(warnings) == warned
    assert not warned or f"a.tif has {step:g} m per pixel, the model was trained at 0.5" in warnings[0]


def test_the_remedy_for_a_shift_depends_on_its_spread():
    dates = ["a.tif", "b.tif"]
    assert far_dates(dates, Shift(1.4, 1.4, 0.1, 9)) == [] == far_dates(dates, Shift(9, 0, 0.1, 9, aligned=True))
    [constant], [other] = far_dates(dates, Shift(3, -4, 0.2, 9)), far_dates(dates, Shift(3, -4, 1.5, 9))
    assert constant.startswith(
        "b.tif lies 5.0 px from a.tif (+3.0 to the right, -4.0 down, spread 0.2), more than 2 px"
    )
    assert constant.endswith("--align (align=True in Python) takes a constant shift out.")
    assert "it is not the same everywhere, so that --align would not help" in other


def test_another_version_of_a_file_is_told_from_the_first(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(b"one")
    first = fingerprint(path)
    assert fingerprint(path) == first == fingerprint(str(path))
    os.utime(path, ns=(0, 0))
    assert fingerprint(path) != first and fingerprint("/vsicurl/a.tif") == ["/vsicurl/a.tif"]
