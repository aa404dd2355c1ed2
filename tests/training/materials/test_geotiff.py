import importlib
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from kcfi.training.materials.cut import LIMITS, read_picture, write_library
from kcfi.training.materials.sources import SURFACES, Source, read_source
from kcfi.training.synthetic.material_library import LibraryMaterials

rasterio = pytest.importorskip("rasterio", reason="the extra `geo` is not installed")
geotiff = importlib.import_module("kcfi.training.materials.geotiff")  # it needs rasterio
from_origin = rasterio.transform.from_origin

UTM, WEB_MERCATOR, LON_LAT = "EPSG:32643", "EPSG:3857", "EPSG:4326"
LEFT, TOP = 450_000.0, 5_300_000.0  # at 47.8 degrees north
HOUSE = (10.0, 8.0, 40.0, 28.0)  # metres right of and below the corner of the first image: left, top, right, bottom
BUILDING, OPEN = SURFACES.index("building"), SURFACES.index("open")


def write_image(path, metres=0.5, side=160, left=LEFT, **profile):
    """A GeoTIFF of grass with the house in red, its right corner without data."""
    pixels = np.full((3, side, side), 100, np.uint8)
    pixels[1] = 130
    west, north, east, south = (round(value / metres) for value in HOUSE)
    pixels[:, north:south, west:east] = np.array([150, 60, 50])[:, None, None]
    pixels[:, -10:, -10:] = 0
    placed = {"crs": UTM, "transform": from_origin(left, TOP, metres, metres), "dtype": "uint8", "nodata": 0}
    settings = {"driver": "GTiff", "width": side, "height": side, "count": 3, **placed, **profile}
    path.parent.mkdir(exist_ok=True)
    with rasterio.open(path, "w", **settings) as file:
        file.write(pixels[: settings["count"]].astype(settings["dtype"]))


def write_footprints(path, system=LON_LAT, **content):
    """The house as GeoJSON, with a point that does not count."""
    west, north, east, south = HOUSE
    corners = [(west, north), (east, north), (east, south), (west, south), (west, north)]
    ring = [(LEFT + x, TOP - y) for x, y in corners]
    geometry = rasterio.warp.transform_geom(UTM, system, {"type": "Polygon", "coordinates": [ring]})
    shapes = [geometry, {"type": "Point", "coordinates": [0, 0]}]
    features = [{"type": "Feature", "properties": {}, "geometry": shape} for shape in shapes]
    if system != LON_LAT:
        content["crs"] = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:{system.replace(':', '::')}"}}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **content}))


@pytest.fixture
def source(tmp_path):
    return Source(tmp_path, "town", "CC0", labels="footprints.geojson")


def read(source, image="images/a.tif"):
    return geotiff.read_geotiff(source, source.root / image, source.root / source.labels if source.labels else None)


@pytest.mark.parametrize("crs", [LON_LAT, UTM])
@pytest.mark.parametrize("metres", [0.1, 0.25, 0.5])
def test_footprints_lie_on_their_buildings(source, crs, metres):
    write_image(source.root / "images/a.tif", metres, round(80 / metres))
    write_footprints(source.root / "footprints.geojson", crs)
    picture = read(source)
    assert picture.pixel == pytest.approx((max(metres, 0.25), max(metres, 0.25)), rel=0.005)
    red = np.asarray(picture.image)[..., 0] > 125
    assert red.any() and (red == (picture.labels == BUILDING)).mean() > 0.998
    assert (picture.labels[-2:, -2:] == SURFACES.index("unknown")).all()  # no data
    assert picture.labels[-1, 0] == OPEN


def test_footprints_elsewhere_leave_an_image_without_buildings(source):
    write_image(source.root / "images/a.tif", left=LEFT + 5000)
    write_footprints(source.root / "footprints.geojson")
    assert not (read(source).labels == BUILDING).any()


def test_pixels_are_measured_on_the_ground_in_any_coordinate_system():
    lon, lat = (values[0] for values in rasterio.warp.transform(UTM, LON_LAT, [LEFT], [TOP]))
    degrees = from_origin(lon, lat, 1e-5, 1e-5)
    east, north = geotiff.ground_size(rasterio.crs.CRS.from_string(LON_LAT), degrees, (100, 100))
    assert (east, north) == pytest.approx((1.112 * np.cos(np.radians(lat)), 1.112), rel=0.005)
    x, y = (values[0] for values in rasterio.warp.transform(UTM, WEB_MERCATOR, [LEFT], [TOP]))
    stretched = geotiff.ground_size(rasterio.crs.CRS.from_string(WEB_MERCATOR), from_origin(x, y, 1, 1), (100, 100))
    assert stretched == pytest.approx((np.cos(np.radians(lat)),) * 2, rel=0.01)


def test_masks_are_laid_over_reduced_images(source):
    write_image(source.root / "images/a.tif", metres=0.125, side=640)
    mask = np.zeros((640, 640), np.uint8)
    mask[64:224, 80:320] = 255
    Image.fromarray(mask).save(source.root / "a.png")
    picture = read(replace(source, labels="a.png", metres_per_pixel=0.125))
    assert picture.image.size == (320, 320) and picture.pixel == (0.25, 0.25)
    assert (picture.labels[32:112, 40:160] == BUILDING).all() and (picture.labels == BUILDING).sum() == 80 * 120


def test_a_source_of_geotiffs_and_footprints_becomes_a_library(tmp_path):
    root = tmp_path / "town"
    root.mkdir()
    for name in "ab":
        write_image(root / f"images/{name}.tif")
    write_footprints(root / "footprints.geojson")
    (root / "source.yaml").write_text(
        "{name: town, licence: CC0, labels: footprints.geojson, regions: '(.).tif', test: [b]}"
    )
    counts = write_library([root], tmp_path / "library")
    assert counts == {"large roof": 2, "tile": 2}
    assert LibraryMaterials(tmp_path / "library", "test").roof("large roof", np.random.default_rng(0)).size == (60, 40)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"dtype": "uint16"}, "bands of uint16; expected 8 bits"),
        ({"crs": None}, r"no coordinate system\. Give GeoTIFFs, or masks as png"),
    ],
)
def test_images_that_cannot_be_used_are_refused(source, profile, message):
    write_image(source.root / "images/a.tif", **profile)
    with pytest.raises(ValueError, match=rf"a.tif: {message}"):
        read(source)


def test_a_broken_image_is_named(source):
    (source.root / "a.tif").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"a.tif: cannot be read as a GeoTIFF"):
        read(source, "a.tif")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"features": None}, "no list 'features'"),
        ({"features": [{"geometry": {"type": "Polygon", "coordinates": []}}]}, r"features\[0\] is no valid Polygon"),
        ({"crs": {"properties": {"name": "somewhere"}}}, "its crs is not understood"),
    ],
)
def test_broken_footprints_are_named(source, content, message):
    write_image(source.root / "images/a.tif")
    write_footprints(source.root / "footprints.geojson", **content)
    with pytest.raises(ValueError, match=rf"footprints.geojson: {message}"):
        read(source)


def test_without_rasterio_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    monkeypatch.delitem(sys.modules, "kcfi.training.materials.geotiff")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "source.yaml").write_text("{name: town, licence: CC0, images: .}")
    source = read_source(tmp_path, list(LIMITS))
    with pytest.raises(ValueError, match=r"rasterio is needed .* pip install \"kcfi\[geo\]\""):
        read_picture(source, source.places()[0])
