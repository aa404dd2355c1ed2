"""`summary.json`: read back it is what was written; what it counts is right."""

import json
from dataclasses import replace

import pytest
from rasterio.crs import CRS
from shapely import MultiPolygon, box

from kcfi.processing import InputError
from kcfi.scenes.findings import Date, Shift
from kcfi.scenes.summary import coverage, crs_name, on_earth, read_summary, size, totals
from kcfi.scenes.writers import write_findings
from tests.kcfi.scenes.conftest import UTM, five, make_change, make_findings, make_grid, town, write_work

TWO = MultiPolygon([box(400_010, 3_499_900, 400_020, 3_499_910), box(400_020, 3_499_880, 400_040, 3_499_900)])
THREE_DATES = (
    Date("a.tif", "2018", "2018-05-01"),
    Date("b.tif", "2019"),
    Date("c.tif", "2021", "2021-06-02", ("x", "y")),
)
CASES = {
    "five": five(warnings=("first", "second <b>")),
    "empty": make_findings(),
    "pixels": town(7, make_grid(crs=None)),
    "multipolygon": make_findings(changes=[make_change(1, make_grid(), (10, 10, 40, 40), polygon=TWO)]),
    "three dates": five(
        dates=THREE_DATES,
        shifts=(Shift(0.1, 0, 0, 3), Shift(0, 0, 0, 0, aligned=True)),
        labels={1: "change", 2: "building", 3: "road"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_back_is_what_was_written(tmp_path, name):
    findings = CASES[name]
    write_findings(
        replace(findings, labels={1: "road", 2: "building"}), write_work(findings, tmp_path / "w"), tmp_path
    )
    assert read_summary(tmp_path) == replace(findings, labels={1: "road", 2: "building"})


def test_the_summary_says_what_people_ask_first(report):
    content = json.loads((report / "summary.json").read_text(encoding="utf-8"))
    assert (content["coverage"], content["seen_area_m2"]) == (600 * 400 / (600 * 450), 600 * 400 / 4)
    assert content["grid"]["crs_name"] == "EPSG:32650" and content["changes"][0]["box"] == [420, 30, 580, 90]
    assert [
        (row["class"], row["kind"], row["count"], row["area_m2"], row["area_ha"]) for row in content["totals"]
    ] == [
        ("building", "appeared", 2, 3900.0, 0.39),
        ("building", "changed", 1, 100.0, 0.01),
        ("building", "removed", 1, 500.0, 0.05),
        ("road", "appeared", 1, 750.0, 0.075),
    ]


def test_totals_are_sums_over_all_changes():
    findings = town(200)
    assert sum(row["count"] for row in totals(findings)) == 200
    whole = size(findings, findings.changes)
    for name in ("pixels", "area_m2", "area_ha"):
        assert sum(row[name] for row in totals(findings)) == pytest.approx(whole[name])
    assert totals(make_findings()) == [] and coverage(make_findings(seen_pixels=27_000)) == 0.1


def test_there_is_no_area_without_a_crs_even_of_nothing():
    findings = town(3, make_grid(crs=None))
    assert all(row["area_m2"] is None and row["area_ha"] is None for row in totals(findings))
    assert size(findings, [])["area_m2"] is None and size(make_findings(), [])["area_m2"] == 0


@pytest.mark.parametrize(
    ("crs", "name", "known"),
    [
        (None, "pixels", False),
        (UTM, "EPSG:32650", True),
        (CRS.from_epsg(4326), "EPSG:4326", True),
        (CRS.from_wkt('LOCAL_CS["site grid",UNIT["metre",1]]'), "site grid", False),
        (CRS.from_proj4("+proj=tmerc +lat_0=31 +lon_0=115 +ellps=GRS80 +units=m"), "unknown", True),
    ],
)
def test_a_crs_is_called_by_its_code_or_its_own_name(crs, name, known):
    assert (crs_name(crs), on_earth(crs)) == (name, known)


def test_a_folder_that_is_no_report_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no summary.json, so no report; `kcfi scene BEFORE AFTER -o"):
        read_summary(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"changes.gpkg: no such file"):
        read_summary(tmp_path)


def test_files_of_two_reports_are_refused(tmp_path):
    one, other = five(), make_findings()
    for name, findings in (("one", one), ("other", other)):
        write_findings(findings, write_work(findings, tmp_path / "work" / name), tmp_path / name)
    (tmp_path / "other" / "changes.gpkg").replace(tmp_path / "one" / "changes.gpkg")
    with pytest.raises(InputError, match=r"summary.json and changes.gpkg beside it are not of one report"):
        read_summary(tmp_path / "one")
