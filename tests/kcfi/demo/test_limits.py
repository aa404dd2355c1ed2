"""What is an upload, what is too large, and what is deleted when."""

import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import rasterio
from PIL import Image

from kcfi.demo.limits import Limits, check_upload, inside, sweep
from kcfi.web.limits import RECEIVED, Refused, check_pixels

LIMITS = Limits(megapixels=1)


def header(width, height):
    """A PNG that promises so many pixels and holds none."""
    content = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT"


def refused(folder, path):
    with pytest.raises(Refused) as caught:
        check_upload(folder, path, LIMITS)
    return caught.value.status


def test_files_of_the_folder_alone_are_inside_of_it(tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "a").write_text("a")
    (tmp_path / "secret").write_text("s")
    (folder / "link").symlink_to(tmp_path / "secret")
    assert inside(folder, str(folder / "a"))
    for path in (
        folder,
        folder / "none",
        folder / "link",
        tmp_path / "secret",
        folder / ".." / "secret",
        "/etc/passwd",
    ):
        assert not inside(folder, str(path)), path
    assert not inside(folder, "a\0b") and not inside(folder, "x" * 5000) and not inside(folder, "")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_images_of_four_kinds_are_taken(tmp_path, kind):
    path = tmp_path / "image"
    Image.new("RGB", (30, 20)).save(path, kind)
    assert check_upload(tmp_path, str(path), LIMITS) is None


@pytest.mark.parametrize(("side", "status"), [(900, None), (20_000, 413)])
def test_a_tiff_that_pil_does_not_know_is_refused_by_its_size(tmp_path, side, status):
    path = tmp_path / "a.tif"
    settings = {"compress": "LERC", "tiled": True, "sparse_ok": True}
    with rasterio.open(path, "w", driver="GTiff", count=1, width=side, height=side, dtype="uint8", **settings):
        pass
    with pytest.raises(Image.UnidentifiedImageError), Image.open(path):
        pass
    if status is None:
        assert check_upload(tmp_path, str(path), LIMITS) is None
    else:
        assert path.stat().st_size < 200_000 and refused(tmp_path, str(path)) == status


def test_what_begins_as_a_tiff_and_is_none_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(b"II+\0" + bytes(60))
    assert refused(tmp_path, str(path)) == 415


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"words",
        b"<VRTDataset rasterXSize='1' rasterYSize='1'><SourceFilename>http://127.0.0.1/a.tif</SourceFilename></VRTDataset>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        b"GIF89a\x01\x00\x01\x00\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;",
    ],
)
def test_what_is_no_such_image_is_refused(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert refused(tmp_path, str(path)) == 415


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "http://127.0.0.1/a.png", "file:///etc/passwd", "../a.png", 7, None, {}]
)
def test_what_was_not_uploaded_is_refused(tmp_path, path):
    assert refused(tmp_path, path) == 403


@pytest.mark.parametrize(("width", "height"), [(1001, 1000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_by_the_header(tmp_path, width, height):
    path = tmp_path / "image.png"
    path.write_bytes(header(width, height))
    assert refused(tmp_path, str(path)) == 413


def test_the_message_names_both_numbers_and_a_way_out():
    with pytest.raises(Refused, match=r"A scene of 2,000 x 600 px .* 1 Mpx: .*`kcfi scene`"):
        check_pixels(2000, 600, LIMITS, "A scene")
    assert check_pixels(1000, 1000, LIMITS, "A scene") is None


def test_old_files_are_deleted_and_then_the_oldest_until_the_rest_fits(tmp_path):
    for number, age in enumerate([9000, 400, 300, 200, 100]):
        path = tmp_path / f"f{number}" / "image.png"
        path.parent.mkdir()
        path.write_bytes(bytes(400_000))
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    (tmp_path / "loose").write_bytes(b"")
    sweep(tmp_path, Limits(stored_megabytes=1, stored_seconds=3600))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"f{n}" for n in range(5)] + ["loose"]
    assert sorted(path.parent.name for path in tmp_path.glob("*/*")) == ["f3", "f4"]
    for path in [*tmp_path.glob("*"), *tmp_path.glob("f4/*")]:  # an upload that broke off, and folders left empty
        os.utime(path, (0, path.stat().st_mtime - RECEIVED))
    sweep(tmp_path, Limits(stored_megabytes=1, stored_seconds=600))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f3", "f4"]
    sweep(tmp_path, Limits(stored_megabytes=1, stored_seconds=150))
    assert list(tmp_path.glob("*/*")) == []


def test_small_files_count_as_what_they_take_on_a_disk(tmp_path):
    for number in range(20):
        (tmp_path / str(number)).write_bytes(b"x")
    sweep(tmp_path, Limits(stored_megabytes=0.05))
    assert len(list(tmp_path.iterdir())) == 12


def test_sweeping_at_once_with_others_and_with_uploads_fails_nobody(tmp_path):
    def upload(number):
        for turn in range(40):
            path = tmp_path / f"{number}-{turn}" / "image.png"
            path.parent.mkdir()
            path.write_bytes(b"x")

    def sweeping(_):
        for _ in range(40):
            sweep(tmp_path, Limits(stored_megabytes=0.02))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(upload, range(4)))
        done = [pool.submit(work, number) for number in range(4, 8) for work in (upload, sweeping)]
    assert [each.exception() for each in done] == [None] * 8
    sweep(tmp_path, Limits(stored_megabytes=0.02))
    assert len(list(tmp_path.glob("*/*"))) == 4
