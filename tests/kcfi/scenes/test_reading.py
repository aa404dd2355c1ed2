"""Dates on the grid: what is read where, which values, and what is said of it."""

import numpy as np
import pytest
import rasterio
from affine import Affine
from PIL import Image
from rasterio.enums import ColorInterp
from scipy import ndimage

from kcfi.processing import InputError
from kcfi.scenes.grid import scene_grid
from kcfi.scenes.reading import Layer, open_raster

UTM = Affine(0.5, 0, 500_000, 0, -0.5, 4_400_000)
INNER = (slice(8, -8), slice(8, -8))  # away from the edges


def layers(*paths, resolution=0.5, reproject=False, **settings):
    sources = [open_raster(path) for path in paths]
    grid = scene_grid(sources, resolution, reproject)
    return [Layer(source, grid, **settings) for source in sources]


def whole(layer):
    return layer.read((0, 0, layer.grid.width, layer.grid.height))


def coloured(easting, northing):
    """What a made-up ground looks like at places in EPSG:32650: smooth, so that it can be resampled."""
    x, y = easting - 500_000, northing - 4_400_000
    return np.stack([128 + 100 * np.sin(x / 4), 128 + 100 * np.sin(y / 5), 128 + 100 * np.sin((x + y) / 6)], -1)


def seen_through(transform, width, height, place=lambda x, y: (x, y)):
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.rint(coloured(*place(*(transform @ (columns, rows))))).astype(np.uint8)


def test_eight_bits_on_the_grid_are_read_as_they_are(tmp_path, write_raster, texture):
    pixels = texture(40, 50)
    first, second = layers(
        write_raster(tmp_path / "a.tif", pixels),
        write_raster(tmp_path / "b.tif", pixels, transform=UTM @ Affine.translation(3, 5)),
    )
    assert np.array_equal(whole(first)[0], pixels[5:, 3:]) and np.array_equal(whole(second)[0], pixels[:-5, :-3])
    assert (
        whole(first)[1].all() and first.notes == ["cut to the ground that all dates cover, 82% of it"] == second.notes
    )
    assert np.array_equal(first.read((2, 1, 9, 11))[0], pixels[6:16, 5:12])


def test_grey_is_three_equal_bands_and_alpha_is_no_colour(tmp_path, write_raster, texture):
    grey = texture(20, 30)[..., 0]
    alpha = np.where(np.arange(30) < 10, 0, 255).astype(np.uint8) + np.zeros((20, 1), np.uint8)
    path = write_raster(tmp_path / "a.tif", np.dstack([grey, alpha]), alpha="unspecified")
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp.gray, ColorInterp.alpha]
    rgb, seen = whole(layers(path, path)[0])
    assert np.array_equal(seen, alpha > 0)
    assert np.array_equal(rgb, np.where(alpha > 0, grey, 0)[..., None].repeat(3, 2))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_what_has_other_than_8_bits_is_stretched_once_per_scene_and_date(tmp_path, write_raster, texture, dtype):
    pixels = texture(60, 80)
    bright = (300 + 9 * pixels.astype(np.float64)).astype(dtype)
    first, second = layers(write_raster(tmp_path / "a.tif", pixels), write_raster(tmp_path / "b.tif", bright))
    rgb, seen = whole(second)
    assert seen.all() and np.array_equal(second.read((7, 9, 30, 40))[0], rgb[9:40, 7:30])  # not once per window
    for band in range(3):
        low, high = np.percentile(bright[..., band], [2, 98], method="nearest")
        shares = (bright[..., band].astype(float) - low) / (high - low)
        assert np.array_equal(rgb[..., band], np.rint(shares.clip(0, 1) * 255))
    assert first.notes == [] and second.notes[0].startswith("stretched to 8 bits from its percentiles 2 to 98 (")


def test_a_stretch_that_is_asked_for_holds_for_8_bits_too(tmp_path, write_raster):
    dark = np.arange(100, dtype=np.uint8).reshape(10, 10)
    [layer, _] = layers(*[write_raster(tmp_path / "a.tif", dark)] * 2, stretch=(0, 100))
    assert whole(layer)[0].min() == 0 and whole(layer)[0].max() == 255
    with pytest.raises(InputError, match="must be a low and a higher percentile"):
        layers(*[tmp_path / "a.tif"] * 2, stretch=(98, 2))


def test_pixels_without_data_are_black_and_not_seen(tmp_path, write_raster, texture):
    pixels = texture(40, 50).clip(1)
    pixels[:, :9] = 0
    known = write_raster(tmp_path / "a.tif", texture(40, 50))
    for name, values, nodata in (
        ("b.tif", pixels, 0),
        ("c.tif", np.where(pixels == 0, np.nan, pixels).astype(np.float32), None),
        ("d.tif", np.where(pixels == 0, np.float32(-9999), pixels), -9999),
    ):
        _, layer = layers(known, write_raster(tmp_path / name, values, nodata=nodata))
        rgb, seen = whole(layer)
        assert not seen[:, :9].any() and seen[:, 9:].all() and (rgb[:, :9] == 0).all() and rgb[:, 9:].any(), name


def test_complex_numbers_are_no_image(tmp_path, write_raster, texture):
    path = write_raster(tmp_path / "a.tif", texture(20, 30).astype(np.complex64))
    with pytest.raises(InputError, match=r"a\.tif: its values are complex numbers: .*DERIVED_SUBDATASET:AMPLITUDE"):
        layers(path, path)


def test_the_stretch_does_not_count_what_has_no_data(tmp_path, write_raster):
    values = np.full((50, 50), -9999, np.float32)
    values[10:40, 10:40] = np.linspace(0, 1, 900).reshape(30, 30)
    [layer, _] = layers(*[write_raster(tmp_path / "a.tif", values, nodata=-9999)] * 2)
    assert "(0.02 to 0.98)" in layer.notes[0].replace("0.0200222", "0.02").replace("0.979978", "0.98")


def test_four_bands_need_to_be_told_apart(tmp_path, write_raster, texture):
    pixels = np.dstack([texture(20, 30), texture(20, 30, seed=1)[..., 0]])
    path = write_raster(tmp_path / "a.tif", pixels, photometric="rgb", alpha="unspecified")
    with pytest.raises(InputError, match=r"a\.tif has 4 bands, and nothing says which are red, green and blue"):
        layers(path, path)
    assert np.array_equal(whole(layers(path, path, bands=[4, 3, 1])[0])[0], pixels[..., [3, 2, 0]])
    with pytest.raises(InputError, match=r"has 4 bands: .* asks for another"):
        layers(path, path, bands=[1, 2, 5])


def test_near_infrared_that_is_declared_as_alpha_is_refused(tmp_path, write_raster, texture):
    pixels = np.dstack([texture(20, 30), texture(20, 30, seed=1)[..., 0]])
    path = write_raster(tmp_path / "a.tif", pixels)
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    with pytest.raises(InputError, match="as if it were near infrared"):
        layers(path, path)


def test_indices_of_a_palette_are_no_colours(tmp_path, write_raster):
    path = write_raster(tmp_path / "a.tif", np.zeros((9, 9), np.uint8), photometric="palette")
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {0: (255, 0, 0, 255)})
    with pytest.raises(InputError, match="indices of a palette"):
        layers(path, path)


@pytest.mark.parametrize(("x", "y"), [(0.5, 0), (0, 0.25), (-0.3, 0.4)])
def test_a_part_of_a_pixel_is_resampled_and_said(tmp_path, write_raster, x, y):
    moved = UTM @ Affine.translation(x, y)
    first, second = layers(
        write_raster(tmp_path / "a.tif", seen_through(UTM, 60, 60)),
        write_raster(tmp_path / "b.tif", seen_through(moved, 60, 60), transform=moved),
    )
    difference = np.abs(whole(first)[0][INNER].astype(int) - whole(second)[0][INNER])
    assert difference.max() <= 3
    note = f"resampled: its pixels lie between those of the grid, by {abs(x):.2f} px across and {abs(y):.2f} down"
    assert second.notes[0] == note and all("resampled" not in each for each in [*first.notes, *second.notes[1:]])


@pytest.mark.parametrize("step", [0.25, 0.3, 0.8])
def test_other_resolutions_are_resampled_and_said(tmp_path, write_raster, step):
    fine, count = UTM @ Affine.scale(step / 0.5), int(30 / step)
    first, second = layers(
        write_raster(tmp_path / "a.tif", seen_through(UTM, 60, 60)),
        write_raster(tmp_path / "b.tif", seen_through(fine, count, count), transform=fine),
    )
    assert np.abs(whole(first)[0][INNER].astype(int) - whole(second)[0][INNER]).max() <= 6
    assert second.notes == [f"resampled from {step:g} to 0.5 m/px"]


def test_a_rotated_date_is_turned_and_what_it_does_not_cover_is_not_seen(tmp_path, write_raster):
    rotated = UTM @ Affine.translation(30, 0) @ Affine.rotation(30)
    first, second = layers(
        write_raster(tmp_path / "a.tif", seen_through(UTM, 120, 120)),
        write_raster(tmp_path / "b.tif", seen_through(rotated, 60, 60), transform=rotated),
    )
    rgb, seen = whole(second)
    inside = ndimage.binary_erosion(seen, iterations=2)
    assert np.abs(whole(first)[0].astype(int) - rgb)[inside].max() <= 4
    assert seen.mean() == pytest.approx(60 * 60 / seen.size, rel=0.05)
    assert second.notes == ["turned so that its rows run from west to east, from the north down"]


def test_another_crs_is_reprojected_and_said(tmp_path, write_raster):
    from rasterio.warp import transform as project

    def place(longitude, latitude):
        x, y = project("EPSG:4326", "EPSG:32650", longitude.ravel(), latitude.ravel())
        return np.reshape(x, longitude.shape), np.reshape(y, longitude.shape)

    [west], [north] = project("EPSG:32650", "EPSG:4326", [500_000], [4_400_000])
    degrees = Affine(0.4 / 85_000, 0, west, 0, -0.4 / 111_000, north)
    first, second = layers(
        write_raster(tmp_path / "a.tif", seen_through(UTM, 60, 60)),
        write_raster(tmp_path / "b.tif", seen_through(degrees, 80, 80, place), "EPSG:4326", degrees),
        reproject=True,
    )
    assert min(first.grid.width, first.grid.height) > 50
    assert np.abs(whole(first)[0][INNER].astype(int) - whole(second)[0][INNER]).max() <= 4
    assert second.notes == ["reprojected from EPSG:4326 to EPSG:32650"]


@pytest.mark.parametrize("crs", ["EPSG:32650", None])
def test_an_offset_is_taken_out(tmp_path, write_raster, crs):
    moved = seen_through(UTM @ Affine.translation(-1.5, 2.25), 60, 60)  # shows everything 1.5 px further right, ...
    first, _ = layers(write_raster(tmp_path / "a.tif", seen_through(UTM, 60, 60), crs), tmp_path / "a.tif")
    layer = Layer(open_raster(write_raster(tmp_path / "b.tif", moved, crs)), first.grid, offset=(1.5, -2.25))
    (expected, _), (rgb, seen) = whole(first), whole(layer)
    assert np.abs(expected[INNER].astype(int) - rgb[INNER]).max() <= 3
    assert not seen[0].any() and not seen[:, -1].any() and seen[3:, :-2].all()  # nobody took these pixels
    assert layer.notes == ["moved by -1.50 px across and +2.25 px down to be aligned"]
    assert layer.overview(30)[0].shape == (30, 30, 3)
    coarse = np.abs(first.overview(30)[0][4:-4, 4:-4].astype(int) - layer.overview(30)[0][4:-4, 4:-4])
    assert coarse.max() <= 4


def test_overviews_are_averages_of_at_most_so_many_pixels(tmp_path, write_raster, texture):
    pixels = texture(40, 80)
    [layer, _] = layers(*[write_raster(tmp_path / "a.tif", pixels)] * 2)
    rgb, seen = layer.overview(40)
    expected = pixels.reshape(20, 2, 40, 2, 3).mean((1, 3))
    assert seen.all() and np.abs(rgb - expected).max() <= 1
    assert np.array_equal(layer.overview(500)[0], pixels)


def test_plain_images_are_read_in_pixels(tmp_path, texture):
    pixels = texture(20, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.jpg", quality=95)
    first, second = layers(tmp_path / "a.png", tmp_path / "b.jpg")
    assert np.array_equal(whole(first)[0], pixels) and np.abs(whole(second)[0].astype(int) - pixels).mean() < 9


def test_a_photograph_on_its_side_is_refused(tmp_path, texture):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(texture(20, 20)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(InputError, match=r"a\.jpg: its EXIF tag says that it lies on its side"):
        open_raster(tmp_path / "a.jpg")


def test_files_that_are_missing_or_no_rasters_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.tif"):
        open_raster(tmp_path / "none.tif")
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(InputError, match=r"text\.tif: cannot be read as a raster"):
        open_raster(tmp_path / "text.tif")


@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.3, 0.0)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("crs", ["EPSG:32650", None])
def test_a_border_without_data_that_the_file_does_not_name_is_left_out(
    tmp_path, write_raster, texture, offset, dtype, crs
):
    values = texture(40, 60).clip(1).astype(dtype)
    values[:, 40:] = 0
    values[10, 10] = 0, 0, 9  # black in two bands only
    path = write_raster(tmp_path / "a.tif", values, crs=crs)
    [as_it_is], [named] = layers(path, offset=offset), layers(path, offset=offset, nodata=0)
    inner = np.s_[2:-2, 2:-2]
    expected = np.broadcast_to(np.arange(60) < 40, (40, 60))
    assert whole(as_it_is)[1][inner].all() and np.array_equal(whole(named)[1][inner], expected[inner])
    assert not whole(named)[0][:, 41:].any() and named.overview(60)[1][10, 10]
    assert named.overview(60)[1].sum() == pytest.approx(40 * 40, abs=40)


@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.25, 0.0)])
def test_a_file_that_names_its_own_nodata_keeps_it(tmp_path, write_raster, texture, offset):
    values = texture(40, 60).clip(1, 254)
    values[:, 40:], values[:, :9] = 255, 0
    [layer] = layers(write_raster(tmp_path / "a.tif", values, nodata=255), offset=offset, nodata=0)
    _, seen = whole(layer)
    assert not seen[2:-2, 42:].any() and seen[2:-2, 2:38].all()


def test_a_format_that_names_other_files_is_not_opened(tmp_path, write_raster, texture):
    """A VRT may name sources anywhere, also on the network."""
    write_raster(tmp_path / "a.tif", texture(40, 60))
    (tmp_path / "b.vrt").write_text(
        '<VRTDataset rasterXSize="8" rasterYSize="6"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{tmp_path / 'a.tif'}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with rasterio.open(tmp_path / "b.vrt") as file:
        assert file.driver == "VRT"  # GDAL itself would
    with pytest.raises(InputError, match=r"b\.vrt: cannot be read as a raster"):
        open_raster(tmp_path / "b.vrt")


def test_a_raster_that_names_another_file_as_its_overviews_is_refused(tmp_path, write_raster, texture):
    path = write_raster(tmp_path / "a.tif", texture(64, 64))
    open_raster(path).close()
    with rasterio.open(path, "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE="/vsicurl/http://127.0.0.1:9/other.tif")
    with pytest.raises(InputError, match=r"a\.tif: names other files as its overviews"):
        open_raster(path)
