"""Known shifts are found; what has no texture, or nothing in common, has none."""

import numpy as np
import pytest
from scipy import ndimage

from kcfi.scenes.grid import scene_grid
from kcfi.scenes.reading import Layer, open_raster
from kcfi.scenes.registration import estimate_shift, shift_between
from kcfi.training.synthetic.dataset import SyntheticDataset


def drawn(number):
    """A drawn scene in grey, 256 x 256 px."""
    return np.asarray(SyntheticDataset(8, seed=3)[number]["image_before"]).astype(float).mean(2)


@pytest.mark.parametrize(("x", "y"), [(0, 0), (0.5, 0), (1.5, -0.25), (-3.3, 4.8), (20, -31.6)])
@pytest.mark.parametrize("number", range(3))
def test_shifts_of_drawn_scenes_are_found_to_a_twentieth_of_a_pixel(x, y, number):
    before = drawn(number)
    light = np.random.default_rng(0).normal(20, 4, before.shape)  # another exposure, and noise
    after = 0.8 * ndimage.shift(before, (y, x), order=3, mode="reflect") + light
    assert shift_between(before, after) == pytest.approx((x, y), abs=0.05)
    assert shift_between(after, before) == pytest.approx((-x, -y), abs=0.05)


def test_what_shows_nothing_has_no_shift():
    texture, flat = drawn(0), np.full((256, 256), 99.0)
    assert shift_between(texture, flat) is None and shift_between(flat, flat) is None
    noise = np.random.default_rng(0).normal(128, 30, (2, 256, 256))
    assert shift_between(*noise) is None


@pytest.fixture
def layers(tmp_path, write_raster):
    def build(before, after, **settings):
        paths = [write_raster(tmp_path / "a.tif", before, **settings), write_raster(tmp_path / "b.tif", after)]
        sources = [open_raster(path) for path in paths]
        grid = scene_grid(sources, 0.5)
        return [Layer(source, grid) for source in sources], grid

    return build


def shifted(image, x, y):
    return ndimage.shift(image.astype(float), (y, x), order=3, mode="wrap").clip(0, 255).astype(np.uint8)


def test_the_shift_of_a_scene_is_the_median_of_its_windows(layers, texture):
    before = texture(600, 800)
    after = np.stack([shifted(before[..., band], 1.5, -0.75) for band in range(3)], -1)
    after[:256, :256] = 77  # a window that shows something else
    shift = estimate_shift(*layers(before, after)[0], layers(before, after)[1])
    assert (shift.x, shift.y) == pytest.approx((1.5, -0.75), abs=0.05)
    assert shift.spread <= 0.05 and 3 <= shift.windows <= 6 and not shift.aligned


def test_windows_without_data_do_not_count(layers, texture):
    before = texture(300, 300).clip(1)
    before[100:140, 100:140] = 0
    pair, grid = layers(before, texture(300, 300), nodata=0)
    assert estimate_shift(*pair, grid).windows == 0


@pytest.mark.parametrize(("width", "windows"), [(256, 1), (64, 4), (63, 0), (1, 0)])
def test_a_scene_narrower_than_a_window_has_none(layers, texture, width, windows):
    image = texture(300, 300)
    pair, grid = layers(image[:, :width], image[:, :width])
    assert estimate_shift(*pair, grid).windows == windows


def test_windows_that_disagree_are_spread(layers, texture):
    before, after = texture(512, 512), np.zeros((512, 512, 3), np.uint8)
    for number, (top, left) in enumerate([(0, 0), (0, 256), (256, 0), (256, 256)]):
        window = slice(top, top + 256), slice(left, left + 256)
        for band in range(3):
            after[(*window, band)] = shifted(before[(*window, band)], 3 * number, 0)
    pair, grid = layers(before, after)
    shift = estimate_shift(*pair, grid)
    assert shift.windows == 4 and shift.x == pytest.approx(4.5, abs=0.1) and shift.spread == pytest.approx(3, abs=0.1)
