"""Two rasters -> a report of `kcfi scene` that names no folder of the server, and is deleted with its answer."""

import io
import re
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from PIL import Image

from kcfi.demo.limits import Limits
from kcfi.demo.scene import describe_files, write_zip
from kcfi.models import load
from kcfi.processing import Describer, InputError
from kcfi.scenes import describe_scene
from kcfi.web.limits import Refused

SIDE = 96


def raster(path, square=None, pixel=0.5, crs="EPSG:32650", north=3_500_000):
    """A grey texture, with a white square."""
    values = np.random.default_rng(0).integers(60, 120, (3, SIDE, SIDE), dtype=np.uint8)
    if square:
        left, top, right, bottom = square
        values[:, top:bottom, left:right] = 255
    path.parent.mkdir(exist_ok=True)
    grid = {"crs": crs, "transform": Affine(pixel, 0, 400_000, 0, -pixel, north)}
    with rasterio.open(path, "w", count=3, height=SIDE, width=SIDE, dtype="uint8", **grid) as file:
        file.write(values)
    return str(path)


@pytest.fixture
def describer(detector):
    return Describer(*load(str(detector), device="cpu"))


@pytest.fixture
def dates(tmp_path):
    return raster(tmp_path / "secret_a" / "2019.tif"), raster(tmp_path / "secret_b" / "2024.tif", (20, 20, 70, 70))


def unhurried():
    """Nothing ends the run."""


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["VRT", "GTI", "overviews", "PNG"])
def test_no_file_leads_gdal_to_another(describer, dates, tmp_path, kind):
    evil = tmp_path / "secret_a" / "evil.tif"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        address = f"/vsicurl/http://127.0.0.1:{server.getsockname()[1]}/a.tif"
        inside = {
            "VRT": '<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
            f"<SourceFilename>{address}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>",
            "GTI": f"<GDALTileIndexDataset><IndexDataset>{address}</IndexDataset></GDALTileIndexDataset>",
        }
        if kind == "overviews":
            evil = Path(dates[0])
            with rasterio.open(evil, "r+") as file:
                file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=address)
        else:
            picture = Image.new("RGB", (SIDE, SIDE))
            picture.save(evil, "PNG" if kind == "PNG" else "JPEG", comment=inside.get(kind, "").encode())
        with pytest.raises(Refused) as caught:
            describe_files(describer, str(evil), dates[1], Limits(), tmp_path, unhurried)
        assert caught.value.status == 415 and str(tmp_path) not in str(caught.value)
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_raster_that_is_too_large_is_refused_though_the_grid_is_small(describer, dates, tmp_path):
    with pytest.raises(Refused, match="96 x 96 px") as caught:
        describe_files(describer, *dates, Limits(megapixels=0.009), tmp_path, unhurried)
    assert caught.value.status == 413


def test_the_report_is_that_of_kcfi_scene_without_folders(describer, dates, tmp_path, detector):
    plain = describe_scene(dates, tmp_path / "plain", describer)
    scene = describe_files(describer, *dates, Limits(), tmp_path, unhurried)
    assert len(plain.changes) == 1
    page, own = (folder / "report.html" for folder in (scene.folder, tmp_path / "plain"))
    assert plain.caption in page.read_text(encoding="utf-8") and "secret_a" in own.read_text(encoding="utf-8")
    assert files(scene.folder) == [name for name in files(tmp_path / "plain") if not name.startswith(".")]
    assert (scene.folder / "mask.tif").read_bytes() == (tmp_path / "plain" / "mask.tif").read_bytes()
    for path in scene.folder.iterdir():
        assert b"secret_" not in path.read_bytes(), path.name
        assert str(detector.parent).encode() not in path.read_bytes(), path.name
    assert "2019.tif" in page.read_text(encoding="utf-8")


def test_the_zip_holds_the_report_and_closing_deletes_it(describer, dates, tmp_path):
    scene = describe_files(describer, *dates, Limits(), tmp_path, unhurried)
    content = io.BytesIO()
    write_zip(scene, content)
    with zipfile.ZipFile(content) as archive:
        assert sorted(archive.namelist()) == files(scene.folder) and archive.testzip() is None
    assert scene.size == sum(path.stat().st_size for path in scene.folder.iterdir()) > 0
    scene.close()
    assert not scene.folder.exists()


def test_a_grid_that_is_too_large_is_refused_though_the_files_are_small(describer, tmp_path):
    coarse = [raster(tmp_path / name / "a.tif", pixel=30) for name in "ab"]
    before = files(tmp_path)
    with pytest.raises(Refused, match=r"A scene \(at 0.5 m/px\) of 5,760 x 5,760 px .* 5 Mpx") as caught:
        describe_files(describer, *coarse, Limits(), tmp_path, unhurried)
    assert caught.value.status == 413 and files(tmp_path) == before


def test_nothing_is_left_of_a_scene_that_cannot_be_described(describer, tmp_path, monkeypatch):
    apart = raster(tmp_path / "a" / "a.tif"), raster(tmp_path / "b" / "b.tif", north=9_000_000)
    before = files(tmp_path)
    with pytest.raises(InputError, match="no ground in common"):
        describe_files(describer, *apart, Limits(), tmp_path, unhurried)
    dates = raster(tmp_path / "a" / "a.tif"), raster(tmp_path / "b" / "b.tif", (20, 20, 70, 70))
    monkeypatch.setattr(describer, "tile_maps", None)
    with pytest.raises(TypeError):
        describe_files(describer, *dates, Limits(), tmp_path, unhurried)
    assert files(tmp_path) == before


def test_a_scene_whose_time_is_over_ends_at_its_next_step_and_leaves_nothing(describer, dates, tmp_path):
    steps, before = [], files(tmp_path)
    describe_files(describer, *dates, Limits(), tmp_path, lambda: steps.append(1)).close()
    assert len(steps) >= 6 and files(tmp_path) == before
    for last in (1, len(steps)):
        left = iter(range(last - 1))

        def check(left=left):
            if next(left, None) is None:
                raise Refused(504, "Too long.")

        with pytest.raises(Refused, match="Too long"):
            describe_files(describer, *dates, Limits(), tmp_path, check)
        assert files(tmp_path) == before


def test_the_page_shows_the_report_in_a_frame_that_may_do_nothing_else(client, dates):
    uploads = [client.upload(open(path, "rb").read(), name=path.rsplit("/")[-1])[0] for path in dates]
    [shown] = client.ask("describe_scene", uploads)["output"]["data"]
    assert 'sandbox="allow-scripts"' in shown and "allow-same-origin" not in shown
    link = re.search(r'src="(/scenes/[\w-]+)/report.html"', shown)[1]
    report = client.http.get(f"{link}/report.html")
    assert report.status_code == 200 and "2019.tif" in report.text and str(client.folder) not in report.text
    assert report.headers["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none'")
    archive = client.http.get(f"{link}.zip")
    assert "report.html" in zipfile.ZipFile(io.BytesIO(archive.content)).namelist()
    for name in ("summary.json", "mask.tif", "..%2f..%2fuploads", "report.html/x"):
        assert client.http.get(f"{link}/{name}").status_code == 404
