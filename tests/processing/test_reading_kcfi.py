"""Files, PIL images and arrays become 8-bit RGB, or are refused by name."""

import json
import struct
import sys
import warnings
import zlib
from multiprocessing.pool import ThreadPool

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn
from PIL import Image
from transformers import AutoImageProcessor
from transformers.dynamic_module_utils import get_imports

from kcfi.processing import InputError, KCFIImageProcessor, KCFIImageProcessorPil, reading_kcfi
from kcfi.processing.reading_kcfi import read_image, read_pair, refusing, stretched

BACKENDS = [KCFIImageProcessor, KCFIImageProcessorPil]
UNNORMALISED = {"do_normalize": False, "do_resize": False}


def pixels(processor, image, **settings):
    """Values 0 to 255 (C, H, W) that the processor reads from one image."""
    values = processor(image, return_tensors="pt", **UNNORMALISED, **settings)["pixel_values"][0] * 255
    return values.round().to(torch.uint8).numpy()


def test_images_are_read_upright_and_in_colour(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.new("L", (8, 6)).save(tmp_path / "turned.jpg", exif=exif)
    image = read_image(tmp_path / "turned.jpg")
    assert (image.mode, image.size) == ("RGB", (6, 8))


def test_a_16_bit_image_is_refused_rather_than_clipped(tmp_path):
    Image.new("I;16", (4, 4), 3000).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png\) of mode 'I;16'.*--stretch 2 98.*Each date"):
        read_image(tmp_path / "deep.png")


def test_a_text_file_is_no_image(tmp_path):
    (tmp_path / "note.png").write_text("no image")
    with pytest.raises(ValueError, match=r"note\.png: cannot be read as an image"):
        read_image(tmp_path / "note.png")


def png_header(width, height):
    """A PNG that promises more pixels than it holds."""
    chunks = b""
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
    ):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.fixture
def zoo(tmp_path):
    """A folder with an 8 x 6 px image of every kind, good and bad."""
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    for mode in ("RGB", "L", "1", "P", "LA", "RGBA", "PA"):
        colours.convert("LA" if mode == "PA" else mode).convert(mode).save(
            tmp_path / f"{mode}.{'tif' if mode == 'PA' else 'png'}"
        )
    for mode in ("CMYK", "YCbCr"):
        colours.convert(mode).save(tmp_path / f"{mode}.jpg")
    colours.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "exif.png", exif=turned)
    Image.fromarray(np.full((6, 8), 3000, np.uint16)).save(tmp_path / "bad_16_bit.png")
    (tmp_path / "bad_zero_byte.png").touch()
    (tmp_path / "bad_truncated.png").write_bytes((tmp_path / "RGB.png").read_bytes()[:80])
    (tmp_path / "bad_text.png").write_text("no image")
    (tmp_path / "bad_bomb.png").write_bytes(png_header(60000, 60000))
    return tmp_path


def test_an_image_of_every_kind_is_read_upright_in_rgb_or_refused_by_name(zoo):
    before, refused = psutil.Process().memory_info().rss, []
    for path in sorted(zoo.iterdir()):
        if not path.name.startswith("bad"):
            image = read_image(path)
            assert (image.mode, image.size) == ("RGB", (8, 6)), path.name
            continue
        with pytest.raises(ValueError, match=path.name):
            read_image(path)
        refused.append(path.name)
    assert len(refused) == 5
    assert psutil.Process().memory_info().rss - before < 50e6  # the bomb would unpack to 10 GB
    assert np.array_equal(read_image(zoo / "exif.png"), read_image(zoo / "RGB.png"))


@pytest.fixture
def write_tiff(tmp_path):
    """Write an array (bands, H, W) as GDAL does: a fourth band of 8 bits is declared as alpha unless alpha="no"."""
    rasterio = pytest.importorskip("rasterio", reason="the extra `geo` is not installed")

    def write(name, values, **profile):
        size = {"height": values.shape[1], "width": values.shape[2]}
        profile = {"driver": "GTiff", "dtype": values.dtype, "count": len(values), **size, **profile}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(tmp_path / name, "w", **profile) as file:
                if values.size:  # otherwise a file whose pixels are promised only
                    file.write(values)
        return tmp_path / name

    return write


def draw_bands(count, dtype=np.uint8, top=255, seed=0):
    """Random bands (count, 6, 8) from 1 to `top`: no band of it looks like an alpha."""
    return np.random.default_rng(seed).integers(1, top, (count, 6, 8)).astype(dtype)


def shown(image):
    """A PIL image as (3, H, W)."""
    return np.asarray(image).transpose(2, 0, 1)


def two_percent(values):
    """What `stretch=[2, 98]` makes of bands, written out with numpy."""
    rows = []
    for band in values.astype(np.float64):
        low, high = np.percentile(band, [2, 98], method="nearest")
        rows.append(np.clip(np.rint((band - low) / (high - low) * 255), 0, 255))
    return np.array(rows, np.uint8)


UNKNOWN_BANDS = {  # four bands: near infrared behind the colours, however a TIFF may say so
    "declared_as_alpha_by_default.tif": {},
    "undefined.tif": {"alpha": "no"},
    "undefined_planar.tif": {"alpha": "no", "photometric": "RGB", "interleave": "band"},
    "grey.tif": {"photometric": "MINISBLACK"},
    "premultiplied.tif": {"alpha": "premultiplied"},
}


@pytest.mark.parametrize("backend", BACKENDS)
class TestBands:
    @pytest.mark.parametrize("name", UNKNOWN_BANDS)
    def test_near_infrared_is_not_composited_over_white(self, backend, name, write_tiff):
        values = draw_bands(4)
        path = write_tiff(name, values, **UNKNOWN_BANDS[name])
        with pytest.raises(InputError, match=rf"{name}.*which.*red, green and blue.*--bands 1 2 3"):
            backend()([[path, path]])
        assert np.array_equal(pixels(backend(), path, bands=[1, 2, 3]), values[:3])
        assert np.array_equal(pixels(backend(bands=[4, 1, 2]), path), values[[3, 0, 1]])

    def test_a_tiff_without_the_tag_that_declares_alpha_is_refused(self, backend, write_tiff):
        """PIL opens it as RGBA, and still does so where the user opens it."""
        values = draw_bands(4)
        path = write_tiff("a.tif", values)
        content, tag = path.read_bytes(), struct.pack("<H", 338)
        assert content.count(tag + struct.pack("<HI", 3, 1)) == 1
        path.write_bytes(content.replace(tag + struct.pack("<HI", 3, 1), struct.pack("<HHI", 337, 3, 1)))
        with Image.open(path) as image:
            assert image.mode == "RGBA"
            for source in (path, image):
                with pytest.raises(InputError, match=r"a\.tif has 4 bands, and nothing says which are red"):
                    backend()(source)
        assert np.array_equal(pixels(backend(), path, bands=[1, 2, 3]), values[:3])

    def test_alpha_that_a_tiff_declares_shows_white(self, backend, write_tiff):
        values = draw_bands(4)
        values[3] = 255
        values[3, :2] = 0
        expected = np.where(values[3] == 0, 255, values[:3])
        assert np.array_equal(pixels(backend(), write_tiff("a.tif", values)), expected)
        wide = write_tiff("wide.tif", values.astype(np.uint16) * 257, photometric="RGB", alpha="yes")
        found = pixels(backend(), wide, stretch=[0, 100])
        assert (found[:, :2] == 255).all()
        assert np.array_equal(found[:, 2:], stretched(values[:3, 2:], [0, 100]))  # the clear ones do not count
        multiplied = write_tiff("multiplied.tif", values.astype(np.uint16), photometric="RGB", alpha="premultiplied")
        with pytest.raises(
            InputError, match=r"multiplied\.tif: its colours are multiplied by its alpha.*--bands 1 2 3"
        ):
            backend()(multiplied, stretch=[0, 100])

    def test_five_bands_are_read_by_their_numbers(self, backend, write_tiff):
        values = draw_bands(5)
        for photometric in ("RGB", "MINISBLACK"):  # of the first, PIL would read three and say nothing
            path = write_tiff("a.tif", values, photometric=photometric)
            with pytest.raises(InputError, match=r"a\.tif has 5 bands"):
                backend()(path)
            assert np.array_equal(pixels(backend(), path, bands=[5, 3, 1]), values[[4, 2, 0]])
            with pytest.raises(InputError, match=r"a\.tif has 5 bands: bands=\[6, 1, 2\] asks for another"):
                backend()(path, bands=[6, 1, 2])

    @pytest.mark.parametrize("count", [2, 4, 5])
    def test_arrays_of_other_than_one_or_three_channels_need_bands(self, backend, count):
        values = draw_bands(count)
        bands = [count, 1, 2]
        for array in (values, values.transpose(1, 2, 0), torch.from_numpy(values), values.astype(np.float32) / 255):
            for settings in ({}, {"do_rescale": False}):
                with pytest.raises(InputError, match=rf"shape .* has {count} bands.*bands=\[1, 2, 3\]"):
                    backend()(array, **settings)
            assert np.array_equal(pixels(backend(), array, bands=bands), values[[count - 1, 0, 1]])
        stack = np.stack([values, values])[None]
        found = backend()(stack, bands=bands, return_tensors="pt", **UNNORMALISED)["pixel_values"]
        assert np.array_equal((found[0, 1] * 255).round(), values[[count - 1, 0, 1]])

    def test_bands_reorder_three(self, backend, write_tiff, tmp_path):
        values = draw_bands(3)
        Image.fromarray(values.transpose(1, 2, 0)).save(tmp_path / "a.png")
        for source in (values, write_tiff("a.tif", values), tmp_path / "a.png"):
            assert np.array_equal(pixels(backend(), source, bands=[3, 2, 1]), values[::-1])

    def test_an_axis_that_cannot_be_told_is_refused_until_it_is_named(self, backend):
        values = np.random.default_rng(0).integers(0, 255, (4, 8, 4), np.uint8)
        with pytest.raises(InputError, match=r"shape \(4, 8, 4\): it cannot be told which axis"):
            backend()(values, bands=[1, 2, 3])
        found = pixels(backend(), values, bands=[1, 2, 3], input_data_format="channels_last")
        assert np.array_equal(found, values.transpose(2, 0, 1)[:3])

    def test_a_finished_image_is_not_taken_apart_again(self, backend, write_tiff):
        """What was read with `bands` and a stretch may be given to a processor that has them too."""
        path = write_tiff("a.tif", draw_bands(4, np.uint16, 9000))
        settings = {"bands": [4, 3, 2], "stretch": [2, 98]}
        image = read_image(path, **settings)
        assert np.array_equal(pixels(backend(**settings), image), shown(image))
        assert np.array_equal(pixels(backend(**settings), path), shown(image))
        assert np.array_equal(pixels(backend(**settings), backend(**settings).fetch_images(path)), shown(image))

    @pytest.mark.parametrize("bands", [[1, 2], [0, 1, 2], [1, 2, 3, 4]])
    def test_other_than_three_numbers_are_refused(self, backend, bands, pair):
        for call in (lambda: backend(bands=bands), lambda: backend()([pair], bands=bands)):
            with pytest.raises(InputError, match="must be three numbers from 1 on"):
                call()


@pytest.mark.parametrize("backend", BACKENDS)
class TestStretch:
    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "float32", "float64"])
    def test_wide_files_are_stretched_where_it_is_asked_for(self, backend, count, dtype, write_tiff):
        values = draw_bands(count, dtype, 4000)
        path = write_tiff("a.tif", values)
        with pytest.raises(InputError, match=r"a\.tif\) of .*--stretch 2 98.*Each date then gets its own"):
            backend()(path)
        expected = np.broadcast_to(two_percent(values), (3, 6, 8))
        assert np.array_equal(pixels(backend(), path, stretch=[2, 98]), expected)
        assert np.array_equal(pixels(backend(stretch=[2, 98]), values), expected)

    def test_16_bit_colours_are_not_halved_without_a_word(self, backend, write_tiff):
        """PIL keeps the upper 8 bits of these, and a scene of 12 bits is almost black."""
        values = draw_bands(3, np.uint16, 4000)
        for name, profile in (("a.tif", {"photometric": "RGB"}), ("a.png", {"driver": "PNG"})):
            path = write_tiff(name, values, **profile)
            with Image.open(path) as image:
                assert image.mode == "RGB"
                with pytest.raises(InputError, match=rf"{name}: PIL gives 8 bits .* give the path"):
                    backend()(image)
            with pytest.raises(InputError, match=rf"{name}\) of dtype uint16 .*--stretch 2 98"):
                backend()(path)
            assert np.array_equal(pixels(backend(), path, stretch=[2, 98]), two_percent(values))

    def test_jpeg_2000_is_read_whole(self, backend, write_tiff):
        values = draw_bands(4, np.uint16, 4000)
        path = write_tiff("a.jp2", values, driver="JP2OpenJPEG", quality=100, reversible="yes")
        with pytest.raises(InputError, match=r"a\.jp2 has 4 bands"):
            backend()(path)
        found = pixels(backend(), path, bands=[4, 1, 2], stretch=[2, 98])
        assert np.array_equal(found, two_percent(values[[3, 0, 1]]))

    def test_wide_images_in_memory_are_stretched(self, backend):
        values = draw_bands(1, np.uint16, 4000)
        expected = np.broadcast_to(two_percent(values), (3, 6, 8))
        for image in (values[0], values[0].astype(np.int32), values[0].astype(np.float32)):
            assert np.array_equal(pixels(backend(), Image.fromarray(image), stretch=[2, 98]), expected)
            assert np.array_equal(pixels(backend(), image, stretch=[2, 98]), expected)

    def test_8_bit_files_are_stretched_too_and_stay_as_they_are_without(self, backend, tmp_path, make_image):
        make_image(0).convert("P").save(tmp_path / "a.png")
        values = shown(Image.open(tmp_path / "a.png").convert("RGB"))
        assert np.array_equal(pixels(backend(), tmp_path / "a.png"), values)
        assert np.array_equal(pixels(backend(), tmp_path / "a.png", stretch=[2, 98]), two_percent(values))

    def test_floats_from_0_to_1_need_no_stretch(self, backend, write_tiff):
        values = draw_bands(3, np.float32) / np.float32(255)
        assert np.array_equal(pixels(backend(), write_tiff("a.tif", values)), draw_bands(3))
        values[:, 0, 0] = -9999
        found = pixels(backend(), write_tiff("b.tif", values, nodata=-9999))
        assert (found[:, 0, 0] == 0).all() and np.array_equal(found[:, 1:], draw_bands(3)[:, 1:])

    @pytest.mark.parametrize(
        ("count", "dtype", "nodata"), [(1, "uint16", 65535), (3, "uint16", 0), (3, "float32", -1e30)]
    )
    def test_pixels_without_data_are_black_and_do_not_count(self, backend, count, dtype, nodata, write_tiff):
        values = draw_bands(count, dtype, 4000)
        values[:, :2] = nodata
        values[0, 2, 0] = nodata  # in one band it is a value like any other, where there are more
        path = write_tiff("a.tif", values, nodata=nodata)
        found = pixels(backend(), path, stretch=[0, 100])
        assert (found[:, :2] == 0).all()
        assert found[:, 2:].max() == 255
        if count == 3:
            assert np.array_equal(found[1:, 2:], stretched(values[1:, 2:], [0, 100]))

    def test_8_bit_pixels_without_data_are_black(self, backend, write_tiff):
        values = draw_bands(3, top=254)
        values[:, :2] = 255
        found = pixels(backend(), write_tiff("a.tif", values, nodata=255))
        assert (found[:, :2] == 0).all() and np.array_equal(found[:, 2:], values[:, 2:])

    def test_nan_and_infinite_values_are_black(self, backend, write_tiff):
        values = draw_bands(3, np.float32, 4000)
        values[0, 0, :3] = np.nan, np.inf, -np.inf
        for source in (values, write_tiff("a.tif", values)):
            found = pixels(backend(), source, stretch=[0, 100])
            assert (found[0, 0, :3] == 0).all()
            assert np.array_equal(found[1:], stretched(values[1:], [0, 100]))

    def test_a_band_of_one_value_is_black(self, backend):
        values = draw_bands(3, np.uint16, 4000)
        values[1] = 700
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert (pixels(backend(), values, stretch=[2, 98])[1] == 0).all()

    def test_the_dates_may_be_files_of_different_kinds(self, backend, write_tiff, tmp_path):
        early, late = draw_bands(4, np.uint16, 4000), draw_bands(3, seed=1)
        files = [write_tiff("early.tif", early), tmp_path / "late.png"]
        Image.fromarray(late.transpose(1, 2, 0)).save(files[1])
        settings = {"bands": [1, 2, 3], "stretch": [2, 98]}
        found = backend(**settings)([files], return_tensors="pt", **UNNORMALISED)["pixel_values"][0] * 255
        assert np.array_equal(found.round(), [two_percent(early[:3]), two_percent(late)])
        assert all(map(np.array_equal, map(shown, read_pair(*files, **settings)), found.round().numpy()))

    @pytest.mark.parametrize("stretch", [[2], [98, 2], [2, 2], [-1, 98], [2, 101], [0, float("nan")]])
    def test_other_than_two_rising_percentiles_are_refused(self, backend, stretch, pair):
        for call in (lambda: backend(stretch=stretch), lambda: backend()([pair], stretch=stretch)):
            with pytest.raises(InputError, match="must be a low and a higher percentile"):
                call()

    def test_settings_of_reading_survive_saving(self, backend, write_tiff, tmp_path):
        path = write_tiff("a.tif", draw_bands(5, np.uint16, 4000))
        settings = {"bands": [5, 3, 1], "stretch": [1, 99], "max_image_pixels": 48}
        processor = backend(**settings)
        processor.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert {name: saved[name] for name in settings} == settings
        reloaded = AutoImageProcessor.from_pretrained(tmp_path, backend=processor.backend)
        assert np.array_equal(pixels(reloaded, path), stretched(draw_bands(5, np.uint16, 4000)[[4, 2, 0]], [1, 99]))
        with pytest.raises(InputError, match="6 px are more than max_image_pixels, 40"):
            reloaded(path, max_image_pixels=40)


DTYPES = st.sampled_from(["uint8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64"]).map(np.dtype)
PERCENTILES = st.tuples(st.floats(0, 49), st.floats(51, 100))


@given(DTYPES.flatmap(lambda dtype: drawn.arrays(dtype, (1, 5, 7))), PERCENTILES)
def test_a_stretch_is_monotone_whatever_the_values(values, stretch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = stretched(values, stretch)
    finite = np.isfinite(values)
    assert found.dtype == np.uint8
    assert (found[~finite] == 0).all()
    order = np.argsort(values[finite], kind="stable")
    assert (np.diff(found[finite][order].astype(int)) >= 0).all()
    equal = np.diff(values[finite][order]) == 0
    assert (np.diff(found[finite][order].astype(int))[equal] == 0).all()


@given(*[drawn.arrays(np.uint16, (5, 7), elements=st.integers(0, 4095)) for _ in range(3)], PERCENTILES)
def test_a_stretch_does_not_depend_on_the_other_date(before, after, other, stretch):
    images = [Image.fromarray(values) for values in (before, after, other)]
    first, second = (read_pair(images[0], image, stretch=stretch)[0] for image in images[1:])
    assert np.array_equal(first, second)
    assert np.array_equal(first, np.broadcast_to(stretched(before[None], stretch).transpose(1, 2, 0), (5, 7, 3)))


class TestLargeImages:
    def test_an_image_of_too_many_pixels_is_refused_by_its_header_with_the_way_out(self, tmp_path, write_tiff):
        (tmp_path / "large.png").write_bytes(png_header(20000, 20000))
        write_tiff("large.tif", np.zeros((5, 0, 0), np.uint8), width=20000, height=20000, sparse_ok=True)
        before = psutil.Process().memory_info().rss
        for name in ("large.png", "large.tif"):
            for read in (read_image, KCFIImageProcessor()):
                message = (
                    rf"{name}: 20000 x 20000 px are more than max_image_pixels, 178956970.*"
                    r"`--max_image_pixels 400000000` of `kcfi caption`, max_image_pixels=400000000 in Python"
                )
                with pytest.raises(InputError, match=message):
                    read(tmp_path / name)
        assert psutil.Process().memory_info().rss - before < 50e6

    @pytest.mark.parametrize("name", ["a.png", "a.tif", "wide.tif"])
    def test_the_setting_decides_and_not_the_limit_of_pil(self, name, monkeypatch, make_image, write_tiff, tmp_path):
        if name == "wide.tif":
            write_tiff(name, np.ones((3, 40, 50), np.float32))
        else:
            make_image(0).save(tmp_path / name)  # 50 x 40 px
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)  # PIL by itself warns of 901 px and refuses 1801
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_image(tmp_path / name, max_image_pixels=2000).size == (50, 40)
            assert KCFIImageProcessor(max_image_pixels=2000)(tmp_path / name)["pixel_values"]
        with pytest.raises(InputError, match="50 x 40 px are more than max_image_pixels, 1999"):
            read_image(tmp_path / name, max_image_pixels=1999)
        assert Image.MAX_IMAGE_PIXELS == 900

    def test_the_limit_of_pil_is_left_as_it_was_by_threads(self, make_image, tmp_path):
        make_image(0).save(tmp_path / "a.png")
        limit = Image.MAX_IMAGE_PIXELS
        assert limit is not None
        with ThreadPool(8) as pool:
            pool.map(lambda _: read_image(tmp_path / "a.png"), range(200))
        assert limit == Image.MAX_IMAGE_PIXELS

    def test_masks_have_the_same_limit(self, pair, tmp_path):
        Image.new("L", (50, 40)).save(tmp_path / "mask.png")
        with pytest.raises(InputError, match=r"mask\.png: 50 x 40 px are more than max_image_pixels, 99"):
            KCFIImageProcessor(max_image_pixels=99)([pair], segmentation_maps=[tmp_path / "mask.png"])

    def test_no_pixels_are_refused(self):
        with pytest.raises(InputError, match="max_image_pixels=0 must be at least 1"):
            KCFIImageProcessor(max_image_pixels=0)


class TestWithoutRasterio:
    def test_files_that_need_it_name_the_extra(self, write_tiff, monkeypatch):
        paths = [write_tiff("a.tif", draw_bands(3, np.uint16)), write_tiff("b.tif", draw_bands(4), alpha="no")]
        plain = write_tiff("c.tif", draw_bands(3)), write_tiff("d.tif", draw_bands(1, np.uint16))
        monkeypatch.setitem(sys.modules, "rasterio", None)
        for path in paths:
            with pytest.raises(InputError, match=rf"{path.name}: .*rasterio does: pip install \"kcfi\[geo\]\""):
                read_image(path, stretch=[2, 98])
        assert np.array_equal(shown(read_image(plain[0])), draw_bands(3))
        expected = np.broadcast_to(two_percent(draw_bands(1, np.uint16)), (3, 6, 8))
        assert np.array_equal(shown(read_image(plain[1], stretch=[2, 98])), expected)

    def test_the_code_on_the_hub_does_not_ask_for_it(self):
        assert "rasterio" not in get_imports(reading_kcfi.__file__)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL, on the way
def test_a_broken_tiff_is_named(tmp_path):
    pytest.importorskip("rasterio", reason="the extra `geo` is not installed")
    (tmp_path / "a.tif").write_bytes(b"II*\0 and nothing more")
    with pytest.raises(InputError, match=r"a\.tif: cannot be read as an image"):
        read_image(tmp_path / "a.tif")


def test_a_tiff_is_read_by_the_driver_of_tiffs_alone(tmp_path, write_tiff):
    """A VRT may name sources anywhere, also on the network."""
    write_tiff("a.tif", draw_bands(3))
    (tmp_path / "b.tif").write_text(
        '<VRTDataset rasterXSize="8" rasterYSize="6"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        '<SourceFilename relativeToVRT="1">a.tif</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>'
    )
    with pytest.raises(InputError, match=r"b\.tif: cannot be read as an image"):
        read_image(tmp_path / "b.tif")


def test_what_a_decoder_raises_is_told_as_bad_input_and_what_is_not_there_stays_so(tmp_path):
    with pytest.raises(InputError, match=r"x\.png: cannot be read as an image \(KeyError: 'a'\)\."):
        with refusing("x.png: cannot be read as an image"):
            {}["a"]
    with pytest.raises(InputError, match=r"^mine$"), refusing("x"):
        raise InputError("mine")
    with pytest.raises(FileNotFoundError, match=r"none\.png"), refusing("x"):
        (tmp_path / "none.png").read_bytes()
    with pytest.raises(KeyboardInterrupt), refusing("x"):
        raise KeyboardInterrupt


def test_our_own_slips_and_a_full_memory_are_no_bad_input(monkeypatch):
    with pytest.raises(MemoryError), refusing("x"):
        raise MemoryError
    with pytest.raises(InputError, match="AttributeError"), refusing("x"):  # a decoder's
        None.size  # noqa: B018
    monkeypatch.delattr(reading_kcfi, "TIFF_STARTS")
    with pytest.raises(NameError, match="TIFF_STARTS"):
        read_image(__file__)
