"""The files of a report, opened by what other people open them with."""

import json
import logging
from dataclasses import replace

import geopandas
import numpy as np
import pytest
import rasterio
from jsonschema import Draft7Validator
from pystac.validation.local_validator import get_local_schema_cache
from rasterio.crs import CRS
from referencing import Registry, Resource
from rio_cogeo import cog_info, cog_validate
from shapely import MultiPolygon, box
from shapely.geometry import shape

from kcfi.pictures import CHANGE_COLOURS
from kcfi.processing import InputError
from kcfi.scenes.findings import Grid
from kcfi.scenes.writers import check_output, write_findings
from tests.kcfi.scenes.conftest import PRINTS, five, make_change, make_findings, make_grid, town, write_work

NAMES = {"mask.tif", "probability.tif", "changes.gpkg", "changes.geojson", "summary.json", "mask.qml", "changes.qml"}
NAMES |= {"item.json", "report.html"} | ({"report.pdf"} if PRINTS else set())


def written(findings, folder):
    return write_findings(findings, write_work(findings, folder / "work"), folder / "report")


def test_a_report_has_all_its_files_and_nothing_else(tmp_path):
    files = written(five(), tmp_path)
    assert set(files) == NAMES and {path.name for path in (tmp_path / "report").iterdir()} == NAMES
    assert all(path == tmp_path / "report" / name and path.stat().st_size for name, path in files.items())


def test_the_same_findings_give_the_same_bytes(tmp_path):
    first, second = (written(five(), tmp_path / name) for name in ("first", "second"))
    assert {name: path.read_bytes() for name, path in first.items()} == {
        name: path.read_bytes() for name, path in second.items()
    }


# Rasters


@pytest.mark.parametrize("name", ["mask.tif", "probability.tif"])
@pytest.mark.parametrize("crs", [None, CRS.from_epsg(32650)], ids=["pixels", "UTM"])
def test_rasters_are_valid_cogs_of_the_same_pixels_on_the_grid(tmp_path, name, crs):
    findings = town(40, make_grid(1500, 1100, crs), seen_pixels=1500 * 1000)
    path = written(findings, tmp_path)[name]
    valid, errors, warnings = cog_validate(path, strict=True)
    assert valid and not errors and not warnings
    with rasterio.open(path) as file, rasterio.open(tmp_path / "work" / name) as source:
        assert (file.read(1) == source.read(1)).all() and file.nodata == source.nodata
        assert (file.crs, file.transform) == (crs, findings.grid.transform)
        assert file.overviews(1) == [2, 4] and file.block_shapes == [(512, 512)]


def test_the_mask_has_the_colours_of_the_project_and_says_what_its_values_mean(report):
    with rasterio.open(report / "mask.tif") as file:
        colours, tags = file.colormap(1), file.tags()
        assert {value: colours[value][:3] for value in (1, 2)} == {value: CHANGE_COLOURS[value] for value in (1, 2)}
        assert file.colorinterp[0].name == "palette"
    assert (tags["classes"], tags["units"]) == ("0 no change, 1 road, 2 building", "class")
    with rasterio.open(report / "probability.tif") as file:
        assert file.tags()["units"] == "probability of change" and file.dtypes == ("uint8",)
        probability = np.ma.masked_invalid(file.read(1, masked=True) * file.scales[0])
        assert probability[50, 500] == pytest.approx(0.95) and probability[200, 10] == pytest.approx(0.02)
        assert probability.mask.sum() == 600 * 50
    assert cog_info(report / "mask.tif").Profile.Nodata == 255


# Polygons


def test_the_geopackage_has_every_change_in_the_crs_of_the_grid(report):
    frame = geopandas.read_file(report / "changes.gpkg", layer="changes")
    findings = five()
    assert frame.crs == "EPSG:32650" and (frame.geom_type == "MultiPolygon").all()
    columns = ["id", "class", "kind", "area_m2", "pixels", "probability", "caption", "place", "before", "after"]
    assert list(frame.columns) == [*columns, "first_seen", "geometry"]
    for row, change in zip(frame.itertuples(), findings.changes, strict=True):
        assert row.geometry.equals(change.polygon)
        assert row.area_m2 == change.area_m2 == pytest.approx(row.geometry.area)
        assert (row.id, row.kind, row.caption, row.place) == (change.id, change.kind, change.caption, change.place)
        assert (row.before, row.after, row.first_seen) == ("2018", "2021", "2021")
    assert frame["class"].tolist() == ["building", "building", "road", "building", "building"]


def geojson(path):
    return json.loads(path.read_text(encoding="utf-8"))


def signed_area(ring):
    """By the shoelace formula: positive where the ring turns to the left."""
    x, y = np.array(ring).T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) / 2


def test_the_geojson_keeps_the_rules_of_rfc_7946(tmp_path):
    grid = make_grid()
    hole = box(400_050, 3_499_900, 400_150, 3_499_980).difference(box(400_080, 3_499_930, 400_110, 3_499_950))
    two = MultiPolygon([box(400_200, 3_499_900, 400_220, 3_499_910), box(400_220, 3_499_880, 400_240, 3_499_900)])
    changes = [make_change(1, grid, (10, 10, 90, 90)), make_change(2, grid, (100, 40, 300, 200), polygon=hole)]
    changes += [make_change(3, grid, (400, 180, 480, 240), polygon=two, caption='"houses" & <b>roads</b>, Ä')]
    content = geojson(written(make_findings(grid, changes), tmp_path)["changes.geojson"])
    assert content["type"] == "FeatureCollection" and "crs" not in content
    for feature, change in zip(content["features"], changes, strict=True):
        assert feature["type"] == "Feature" and feature["properties"]["caption"] == change.caption
        geometry = feature["geometry"]
        polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
        for outer, *inner in polygons:
            for ring in (outer, *inner):
                assert ring[0] == ring[-1] and len(ring) >= 4 and all(len(position) == 2 for position in ring)
                assert all(115.9 < x < 116 and 31.6 < y < 31.7 for x, y in ring)  # longitude first
            assert signed_area(outer) > 0 and all(signed_area(ring) < 0 for ring in inner)  # the right-hand rule
        placed = geopandas.GeoSeries([change.polygon], crs=grid.crs).to_crs("EPSG:4326")[0]
        assert shape(geometry).is_valid and shape(geometry).hausdorff_distance(placed) < 2e-7  # 2 cm
    assert [feature["geometry"]["type"] for feature in content["features"]] == ["Polygon", "Polygon", "MultiPolygon"]
    assert len(content["features"][1]["geometry"]["coordinates"]) == 2
    named = {"id", "class", "kind", "area_m2", "pixels", "probability", "caption", "place", "before", "after"}
    assert set(content["features"][0]["properties"]) == {*named, "first_seen"}


def test_every_feature_is_valid_by_the_schema_of_geojson(report):
    schemas = get_local_schema_cache()  # in the package: nothing is fetched
    registry = Registry().with_resources([(uri, Resource.from_contents(schema)) for uri, schema in schemas.items()])
    validator = Draft7Validator(schemas["https://geojson.org/schema/Feature.json"], registry=registry)
    features = geojson(report / "changes.geojson")["features"]
    assert len(features) == 5 and [error for feature in features for error in validator.iter_errors(feature)] == []
    features[0]["geometry"]["coordinates"][0][0] = ["east"]  # the check would see it
    assert list(validator.iter_errors(features[0]))


def test_polygons_without_a_crs_are_in_pixels_and_say_so(tmp_path):
    findings = town(3, make_grid(crs=None))
    files = written(findings, tmp_path)
    frame = geopandas.read_file(files["changes.gpkg"])
    assert frame.crs is None and frame.area_m2.isna().all() and (frame.pixels > 0).all()
    assert frame.geometry[0].equals(findings.changes[0].polygon)
    content = geojson(files["changes.geojson"])
    assert content["description"].endswith(
        "not longitude and latitude, but those of the images: pixels, x to the right, y down"
    )
    assert shape(content["features"][0]["geometry"]).equals(findings.changes[0].polygon)
    assert content["features"][0]["properties"]["area_m2"] is None


@pytest.mark.parametrize("crs", [None, CRS.from_epsg(32650)], ids=["pixels", "UTM"])
def test_no_changes_are_valid_empty_layers(tmp_path, crs):
    files = written(make_findings(make_grid(crs=crs)), tmp_path)
    frame = geopandas.read_file(files["changes.gpkg"])
    assert len(frame) == 0 and frame.crs == crs and "first_seen" in frame.columns and frame["id"].dtype == "int64"
    assert geojson(files["changes.geojson"])["features"] == []


SITE = CRS.from_wkt('LOCAL_CS["site grid",UNIT["metre",1]]')
OWN = CRS.from_proj4("+proj=tmerc +lat_0=31.6 +lon_0=115.95 +x_0=400000 +y_0=3500000 +ellps=GRS80 +units=m")


def test_the_grid_of_a_site_stays_in_its_own_coordinates(tmp_path):
    findings = town(4, replace(make_grid(), crs=SITE))
    files = written(findings, tmp_path)
    assert set(files) == NAMES - {"item.json"}
    assert geopandas.read_file(files["changes.gpkg"]).geometry[0].equals(findings.changes[0].polygon)
    content = geojson(files["changes.geojson"])
    assert content["description"].endswith("those of the images: site grid") and "crs" not in content
    assert shape(content["features"][0]["geometry"]).equals(findings.changes[0].polygon)
    assert "site grid" in files["report.html"].read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["degrees", "own projection"])
def test_other_systems_become_longitude_and_latitude(tmp_path, name):
    degrees = Grid(CRS.from_epsg(4326), rasterio.Affine(1e-5, 0, 115.9, 0, -1e-5, 31.65), 300, 200, (0.95, 1.11))
    grid = degrees if name == "degrees" else replace(make_grid(), crs=OWN)
    files = written(town(4, grid), tmp_path)
    assert set(files) == NAMES
    for feature in geojson(files["changes.geojson"])["features"]:
        left, bottom, right, top = shape(feature["geometry"]).bounds
        assert 115.8 < left < right < 116 and 31.5 < bottom < top < 31.7


# What is left out, and what is left of an earlier or killed call


def test_what_is_left_out_is_said_and_an_earlier_one_removed(tmp_path, caplog, monkeypatch):
    assert "item.json" in written(five(), tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    nobody_knows = tuple(replace(date, acquired="") for date in five().dates)
    files = written(five(dates=nobody_knows), tmp_path)
    assert set(files) == NAMES - {"item.json"} == {path.name for path in (tmp_path / "report").iterdir()}
    assert "item.json is left out: nobody says when the first or the last image was acquired." in caplog.text
    written(make_findings(make_grid(crs=None)), tmp_path)
    assert "item.json is left out: the coordinates of the images cannot become longitude and latitude." in caplog.text


def test_a_scene_at_the_antimeridian_has_a_report_without_an_item(tmp_path):
    place = rasterio.Affine(0.5, 0, 165_921, 0, -0.5, 4_000)
    files = written(town(4, replace(make_grid(), crs=CRS.from_epsg(32601), transform=place)), tmp_path)
    assert set(files) == NAMES - {"item.json"}


def test_a_call_that_fails_leaves_the_report_as_it_was(tmp_path):
    files = written(five(), tmp_path)
    before = {name: path.read_bytes() for name, path in files.items()}
    (tmp_path / "work" / "date-1.png").unlink()
    with pytest.raises(FileNotFoundError):
        write_findings(town(9), tmp_path / "work", tmp_path / "report")
    assert {name: path.read_bytes() for name, path in files.items()} == before
    assert set(written(five(), tmp_path)) == {path.name for path in (tmp_path / "report").iterdir()}


def test_files_of_no_report_are_not_replaced(tmp_path):
    work, output = tmp_path / "out" / ".work", tmp_path / "out"
    check_output(["a.tif", "b.tif"], work, output)
    work.mkdir(parents=True)
    image = output / "mask.tif"
    image.write_text("mine")
    check_output(["a.tif", "b.tif"], work, output)  # of an earlier call
    with pytest.raises(InputError, match=r"mask\.tif: the report would replace this image; choose another output"):
        check_output(["a.tif", output / "x" / ".." / "mask.tif"], work, output)
    work.rmdir()
    with pytest.raises(InputError, match=r"mask\.tif: the report would replace this file, .* move it, or choose"):
        check_output(["a.tif", "b.tif"], work, output)
    (output / "summary.json").write_text("{}")
    check_output(["a.tif", "b.tif"], work, output)


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "notes.txt").write_text("mine")
    written(five(), tmp_path)
    assert (tmp_path / "report" / "notes.txt").read_text() == "mine"
