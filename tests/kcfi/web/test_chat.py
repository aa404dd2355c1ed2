"""What is passed on of a request: two PNGs of one size, a text, a number of tokens; everything else is refused."""

import base64
import io
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from kcfi.processing import INSTRUCTIONS
from kcfi.processing.describer_kcfi import LONGEST
from kcfi.web.chat import LONGEST_TEXT, plain_request
from kcfi.web.limits import Refused, RequestLimits
from tests.kcfi.web.test_limits import png_header

LIMITS = RequestLimits(megapixels=1)
NAMES = ("tiny", "/models/tiny")


def url(image, kind="PNG", **options):
    """A data URL of an image, or of bytes."""
    content = image if isinstance(image, bytes) else io.BytesIO()
    if not isinstance(image, bytes):
        image.save(content, kind, **options)
        content = content.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"


GREY = url(Image.new("L", (30, 20), 90))


def request(*sources, text="What?", **fields):
    """A request about images."""
    parts = [{"type": "image_url", "image_url": {"url": source}} for source in sources or (GREY, GREY)]
    parts += [] if text is None else [{"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": parts}], **fields}


def passed(given):
    """What becomes of a request."""
    return json.loads(plain_request(json.dumps(given).encode(), NAMES, "<image>", LIMITS))


def refused(given, status=400):
    """What is told in its place."""
    body = given if isinstance(given, bytes) else json.dumps(given).encode()
    with pytest.raises(Refused) as caught:
        plain_request(body, NAMES, "<image>", LIMITS)
    assert caught.value.status == status and str(caught.value).endswith(".")
    return str(caught.value)


def images(plain):
    """The images of what is passed on."""
    sources = [part["image_url"]["url"] for part in plain["messages"][0]["content"][:2]]
    return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def test_nothing_is_passed_on_that_was_not_written_here():
    given = request(GREY, GREY, model="tiny", temperature=0.7, user="me", stream=True, max_tokens=5)
    given["messages"][0]["name"] = "me"
    plain = passed(given)
    assert plain.keys() == {"messages", "stream", "max_tokens"}
    assert (plain["stream"], plain["max_tokens"]) == (True, 5)
    [message] = plain["messages"]
    assert message.keys() == {"role", "content"} and message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["image_url", "image_url", "text"]
    assert message["content"][2] == {"type": "text", "text": "What?"}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_an_image_of_each_kind_becomes_a_png_of_the_same_pixels(kind):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    source = url(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    for found in images(passed(request(source, source))):
        assert (found.format, found.mode, found.size) == ("PNG", "RGB", (30, 20))
        expected = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")
        assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_images_are_read_as_kcfi_caption_does():
    turned, exif = Image.new("RGB", (20, 30), "red"), Image.Exif()
    exif[0x0112] = 6
    clear = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    upright, white = images(passed(request(url(turned, exif=exif), url(clear))))
    assert upright.size == (30, 20) and white.getpixel((0, 0)) == (255, 255, 255)


def test_what_a_request_may_leave_out():
    plain = passed(request(text=None))
    assert (plain["stream"], plain["max_tokens"]) == (False, LONGEST)
    assert plain["messages"][0]["content"][2]["text"] == INSTRUCTIONS[0]
    assert passed(request(max_tokens=None, stream=None, model=None)) == passed(request())
    assert passed(request(max_completion_tokens=3, max_tokens=9))["max_tokens"] == 3
    assert passed(request(max_tokens=10**6))["max_tokens"] == LONGEST
    assert passed(request(model="/models/tiny")) == passed(request())


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 50_000, b"[]", b"7", b"null"])
def test_what_is_no_request_is_refused(body):
    assert "JSON" in refused(body)


@pytest.mark.parametrize("value", [b"[]", b"{}", b"0.5"])
def test_many_small_values_are_refused_before_they_take_memory(value):
    body = b'{"messages": [' + b",".join([value] * 300_000) + b"]}"
    tracemalloc.start()
    told = refused(body, 413)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "more values" in told and most < len(body)


def test_a_text_of_half_a_character_is_refused():
    assert "no Unicode" in refused(request(text="a \ud800"))
    assert passed(request(text="\U0001f3e0"))["messages"][0]["content"][2]["text"] == "\U0001f3e0"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model": "other"}, "'tiny'"),
        ({"model": 7}, "'tiny'"),
        ({"stream": "yes"}, "`stream`"),
        ({"max_tokens": 0}, "`max_tokens`"),
        ({"max_tokens": True}, "`max_tokens`"),
        ({"max_tokens": "9"}, "`max_tokens`"),
        ({"chat_template_kwargs": {"chat_template": "{{ 9 ** 9 ** 9 }}"}}, "'chat_template_kwargs'"),
        ({"generation_config": "{}"}, "'generation_config'"),
        ({"x" * 10_000: 1}, "leave out all but"),
        ({"messages": None}, "one message"),
        ({"messages": []}, "one message"),
        ({"messages": [request()["messages"][0]] * 2}, "one message"),
        ({"messages": ["hello"]}, "one message"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "one message"),
        ({"messages": [{"role": "system", "content": []}]}, "one message"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "image_url or text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, "image_url or text"),
    ],
)
def test_other_fields_and_values_are_refused(fields, told):
    message = refused({**request(), **fields})
    assert told in message and len(message) < 300


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_pair_has_two_images(count):
    assert f"has {count}" in refused(request(*[GREY] * count))


@pytest.mark.parametrize(
    "source",
    [
        "http://127.0.0.1/a.png",
        "https://127.0.0.1/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "iVBORw0KGgo=",
        "",
        None,
        7,
        [],
        {},
    ],
)
def test_addresses_and_paths_are_refused_with_how_to_send_an_image(source):
    for pair in ((source, GREY), (GREY, source)):
        told = refused(request(*pair))
        assert "Nothing is fetched" in told and "data:image/png;base64" in told


@pytest.mark.parametrize(
    "source",
    [
        "data:text/html;base64,AAAA",
        "data:image/png,AAAA",
        "data:image/png;base64,A",
        "data:image/png;base64,not base64!",
        "data:image/png;base64,é",
        "data:,",
    ],
)
def test_data_that_is_no_image_in_base64_is_refused(source):
    assert "base64" in refused(request(GREY, source))


def test_files_that_are_no_images_or_broken_are_refused():
    for source in (url(b"words"), url(b""), "data:image/png;base64"):
        assert "PNG, JPEG, WebP or TIFF" in refused(request(GREY, source), 415)
    cut = base64.b64decode(url(Image.effect_noise((30, 20), 90)).partition(",")[2])[:-40]
    assert "cannot be read as an image" in refused(request(GREY, url(cut)))
    assert "differ in size" in refused(request(GREY, url(Image.new("L", (31, 20)))))
    assert "8 bits" in refused(request(GREY, url(Image.fromarray(np.full((20, 30), 300, np.uint16)))))


@pytest.mark.parametrize(("width", "height"), [(1001, 1000), (20_000, 8_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_before_it_is_decoded(width, height):
    given = request(GREY, url(png_header(width, height)))
    tracemalloc.start()
    refused(given, 413)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10_000_000


def test_a_text_may_be_long_but_not_without_end_and_holds_no_image_token():
    assert passed(request(text="x" * LONGEST_TEXT))
    assert f"{LONGEST_TEXT + 1:,} characters" in refused(request(text="x" * (LONGEST_TEXT + 1)))
    assert "<image>" in refused(request(text="a <image>"))
