"""The STAC item: valid by the schema that pystac carries, and with the right place, days and files."""

import json
from dataclasses import replace

import pystac
import pytest
from affine import Affine
from jsonschema import Draft7Validator
from pystac.extensions.projection import ProjectionExtension
from pystac.validation.local_validator import get_local_schema_cache
from rasterio.crs import CRS
from referencing import Registry, Resource
from shapely.geometry import shape

from kcfi.processing import InputError
from kcfi.scenes.catalogue import ASSETS, footprint, refusal, write_item
from kcfi.scenes.findings import Date, Grid
from tests.kcfi.scenes.conftest import PRINTS, five, make_findings, make_grid

ITEM_SCHEMA = "https://schemas.stacspec.org/v1.1.0/item-spec/json-schema/item.json"


@pytest.fixture(scope="module")
def validator():
    """Of STAC items, from the schemas in the package: nothing is fetched."""
    schemas = get_local_schema_cache()
    registry = Registry().with_resources([(uri, Resource.from_contents(schema)) for uri, schema in schemas.items()])
    return Draft7Validator(schemas[ITEM_SCHEMA], registry=registry)


def item_of(findings, path, names=("mask.tif",)):
    write_item(findings, names, path)
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_item_is_valid_by_the_schema_of_stac(report, validator):
    content = json.loads((report / "item.json").read_text(encoding="utf-8"))
    assert content["stac_version"] == "1.1.0" and list(validator.iter_errors(content)) == []
    del content["properties"]["start_datetime"]  # the check would see it
    assert list(validator.iter_errors(content))


def test_the_item_names_every_file_with_its_type_and_role(report):
    item = pystac.Item.from_file(report / "item.json")
    present = {path.name for path in report.iterdir()} - {"item.json"}
    assert set(item.assets) == present == set(ASSETS) - (set() if PRINTS else {"report.pdf"})
    for name, asset in item.assets.items():
        assert asset.href == f"./{name}" and asset.media_type and asset.roles
    assert item.assets["mask.tif"].media_type == "image/tiff; application=geotiff; profile=cloud-optimized"
    assert item.assets["summary.json"].roles == ["metadata"] and item.assets["report.html"].roles == ["overview"]


def test_the_item_says_where_and_when(report):
    item = pystac.Item.from_file(report / "item.json")
    assert (item.id, item.datetime) == ("kcfi-2018-2021", None)
    assert item.properties["start_datetime"] == "2018-05-01T00:00:00Z"
    assert item.properties["end_datetime"] == "2021-06-02T00:00:00Z"
    assert item.properties["processing:software"] == {"kcfi": "0.1.0", "rasterio": "1.4.4"}
    projection = ProjectionExtension.ext(item)
    assert (projection.code, projection.shape) == ("EPSG:32650", [450, 600])
    assert projection.transform == [0.5, 0, 400_000, 0, -0.5, 3_500_000]
    outline = shape(item.geometry)
    assert outline.exterior.is_ccw and list(outline.bounds) == item.bbox
    assert 115.945 < item.bbox[0] < item.bbox[2] < 115.949 and 31.628 < item.bbox[1] < item.bbox[3] < 31.631


def test_a_crs_without_a_code_is_written_out(tmp_path, validator):
    own = CRS.from_proj4("+proj=tmerc +lat_0=31.6 +lon_0=115.95 +x_0=400000 +y_0=3500000 +ellps=GRS80 +units=m")
    content = item_of(make_findings(replace(make_grid(), crs=own)), tmp_path / "item.json")
    assert list(validator.iter_errors(content)) == []
    assert "proj:code" not in content["properties"] or content["properties"]["proj:code"] is None
    assert content["properties"]["proj:wkt2"].startswith("PROJCRS[")


def test_a_time_of_day_is_kept(tmp_path):
    dates = (Date("a", "a b/c", "2018-05-01T10:30:00+08:00"), Date("b", "ü", "2021-06-02"))
    content = item_of(five(dates=dates), tmp_path / "item.json")
    assert content["properties"]["start_datetime"] == "2018-05-01T02:30:00Z" and content["id"] == "kcfi-a-b-c-ü"


def test_an_item_ends_after_it_begins(tmp_path):
    days = ("2021-06-02", "", "2024-05-30", "2018-05-01")
    content = item_of(five(dates=tuple(Date(day, day or "x", day) for day in days)), tmp_path / "item.json")
    assert content["properties"]["start_datetime"] == "2018-05-01T00:00:00Z"
    assert content["properties"]["end_datetime"] == "2024-05-30T00:00:00Z"


def test_a_date_that_is_none_is_refused(tmp_path):
    dates = (Date("before.tif", "a", "May 2018"), Date("b", "b", "2021-06-02"))
    with pytest.raises(InputError, match=r"before\.tif: acquired 'May 2018' is no date in ISO 8601"):
        item_of(five(dates=dates), tmp_path / "item.json")


def test_the_sides_of_a_large_scene_follow_their_curve():
    outline = footprint(make_grid(4000, 4000, pixel=100))  # 400 km
    assert len(outline.exterior.coords) == 17 and outline.is_valid
    corners = [outline.exterior.coords[index] for index in (0, 8)]
    assert all(len(corner) == 2 for corner in corners) and outline.convex_hull.area > outline.area * 1.0001


def test_what_has_no_place_or_day_has_no_item():
    assert refusal(five()) is None
    assert "longitude and latitude" in refusal(make_findings(make_grid(crs=None)))
    assert "nobody says when" in refusal(five(dates=(Date("a", "a"), Date("b", "b", "2021-06-02"))))


ELSEWHERE = {
    "across the antimeridian": ("EPSG:32601", Affine(0.5, 0, 165_921, 0, -0.5, 4_000)),
    "across it in degrees": ("EPSG:4326", Affine(1e-5, 0, 179.999, 0, -1e-5, 0)),
    "up to it": ("EPSG:4326", Affine(1e-5, 0, 179.994, 0, -1e-5, 0)),
    "across it near a pole": ("EPSG:3031", Affine(0.5, 0, -100, 0, -0.5, -1e6)),
    "around a pole": ("EPSG:3413", Affine(0.5, 0, -100, 0, -0.5, 100)),
    "around the earth": ("EPSG:4326", Affine(0.6, 0, -179.9, 0, -0.2, 45)),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_where_longitudes_jump_there_is_no_item(where):
    crs, transform = ELSEWHERE[where]
    grid = Grid(CRS.from_string(crs), transform, 599 if where == "around the earth" else 600, 450, (0.5, 0.5))
    assert footprint(grid) is None and "touches the antimeridian or a pole" in refusal(make_findings(grid))
