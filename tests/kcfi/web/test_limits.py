"""What is too large is refused by its header, and what is no image of the four kinds is none."""

import io
import struct
import zlib

import pytest
from PIL import Image

from kcfi.web.limits import FORMATS, Refused, RequestLimits, check_header, check_pixels

LIMITS = RequestLimits(megapixels=1)


def png_header(width, height):
    """A PNG that promises so many pixels and holds none."""
    content = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT"


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_is_taken_and_its_file_stays_open(kind):
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, kind)
    file.seek(0)
    check_header(file, LIMITS)
    file.seek(0)
    assert Image.open(file).size == (30, 20)


@pytest.mark.parametrize(("width", "height"), [(1001, 1000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_by_the_header(width, height):
    with pytest.raises(Refused, match=r"px|pixels") as caught:
        check_header(io.BytesIO(png_header(width, height)), LIMITS)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    "content", [b"", b"words", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a\x01\0\x01\0"]
)
def test_what_is_no_such_image_is_refused(content):
    with pytest.raises(Refused, match="PNG, JPEG, WebP or TIFF") as caught:
        check_header(io.BytesIO(content), LIMITS)
    assert caught.value.status == 415


def test_the_message_names_both_numbers_and_a_way_out():
    check_pixels(1000, 1000, LIMITS, "A scene")
    with pytest.raises(Refused, match=r"A scene of 2,000 x 600 px .* 1 Mpx: .*`kcfi scene`"):
        check_pixels(2000, 600, LIMITS, "A scene")
