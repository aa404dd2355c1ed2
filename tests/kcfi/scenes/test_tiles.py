"""Rows of tiles against the blend of a whole image, and against `Describer`."""

import numpy as np
import pytest
import torch

from kcfi.models import load
from kcfi.processing import NO_LABEL, Describer
from kcfi.processing.describer_kcfi import blend, tile_boxes, tile_starts
from kcfi.scenes.grid import scene_grid
from kcfi.scenes.kept import Kept
from kcfi.scenes.reading import Layer, open_raster
from kcfi.scenes.tiles import blend_row, blend_rows, detect, read_both, strip_bounds

TILE = 32
SIZES = [
    (97, 61),
    (33, 211),
    (70, 5),
    (5, 71),
    (32, 32),
    (57, 57),
]  # odd, narrower than a tile, rows that overlap twice


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_rows_of_tiles_of_a_picture_give_the_picture(width, height):
    picture = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    tops, lefts = tile_starts(height, TILE), tile_starts(width, TILE)

    def row(number):
        lines = picture[:, tops[number] : tops[number] + TILE]
        return blend_row([lines[..., left : left + TILE] for left in lefts], lefts, lines.shape)

    strips = list(blend_rows(row, height, TILE))
    assert [strip.shape[1] for strip in strips] == [bottom - top for top, bottom in strip_bounds(height, TILE)]
    torch.testing.assert_close(torch.cat(strips, 1), picture, rtol=0, atol=1e-6)


def scores_of_tiles(width, height):
    """Tiles that disagree: a random map for each, by its box."""
    numbers = torch.Generator().manual_seed(1)
    boxes = tile_boxes(width, height, TILE)
    return {box: torch.randn(2, box[3] - box[1], box[2] - box[0], generator=numbers) for box in boxes}


def row_of(tiles, width, height):
    tops = tile_starts(height, TILE)

    def row(number):
        mine = {box[0]: values for box, values in tiles.items() if box[1] == tops[number]}
        lines = min(TILE, height)
        return blend_row(mine.values(), list(mine), (2, lines, width))

    return row


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_strips_are_the_blend_of_the_whole_image(width, height):
    tiles = scores_of_tiles(width, height)
    strips = torch.cat(list(blend_rows(row_of(tiles, width, height), height, TILE)), 1)
    torch.testing.assert_close(strips, blend(tiles.values(), list(tiles), (2, height, width)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(40, 211), (40, 57)])
def test_strips_from_any_on_are_the_same_bit_by_bit(width, height):
    row = row_of(scores_of_tiles(width, height), width, height)
    strips = list(blend_rows(row, height, TILE))
    for first in range(len(strips) + 1):
        again = list(blend_rows(row, height, TILE, first))
        assert len(again) == len(strips) - first
        assert all(torch.equal(one, other) for one, other in zip(again, strips[first:], strict=True))


def test_a_row_without_tiles_is_0():
    assert torch.equal(blend_row([], [], (2, 3, 4)), torch.zeros(2, 3, 4))


@pytest.fixture
def pair(tmp_path, write_raster, make_pair):
    """Layers of a pair of 150 x 97 px in which a square of 20 px changes, and the grid."""

    def build(spoil=None):
        before, after = map(np.array, make_pair(150, 97, (60, 30, 80, 50)))
        if spoil:
            spoil(before, after)
        paths = [write_raster(tmp_path / "a.tif", before, nodata=0), write_raster(tmp_path / "b.tif", after, nodata=0)]
        sources = [open_raster(path) for path in paths]
        grid = scene_grid(sources, 0.5)
        return [Layer(source, grid) for source in sources], grid

    return build


def found(describer, pair, folder):
    layers, grid = pair
    strips = list(detect(describer, *layers, grid, Kept(folder, {})))
    return {name: np.concatenate([strip[name] for strip in strips]) for name in ("mask", "probability")}


def test_the_mask_is_that_of_the_describer(detector, pair, tmp_path, make_pair):
    describer = Describer(*load(str(detector)))
    result = found(describer, pair(), tmp_path / "kept")
    expected = describer.describe(*make_pair(150, 97, (60, 30, 80, 50)))
    assert np.array_equal(result["mask"], expected.mask) and result["mask"].any()
    assert (result["probability"][result["mask"] > 0] >= 33).all() and result["probability"].max() <= 100


def test_the_number_of_tiles_at_a_time_changes_nothing(detector, pair, tmp_path):
    model = load(str(detector))
    one, three = (found(Describer(*model, batch_size=size), pair(), tmp_path / str(size)) for size in (1, 3))
    assert np.array_equal(one["mask"], three["mask"])
    assert np.abs(one["probability"].astype(int) - three["probability"]).max() <= 1


def test_what_a_date_has_no_data_for_is_neither_changed_nor_seen(detector, pair, tmp_path):
    def spoil(before, after):
        before[:, :40] = 0
        after[70:] = 0
        after[25:35, 55:70] = 0  # a part of the square

    describer = Describer(*load(str(detector)))
    layers, grid = pair(spoil)
    mask = found(describer, (layers, grid), tmp_path / "kept")["mask"]
    unseen = np.zeros_like(mask, bool)
    unseen[:, :40] = unseen[70:] = unseen[25:35, 55:70] = True
    assert np.array_equal(mask == NO_LABEL, unseen)
    rows, columns = np.nonzero((mask > 0) & ~unseen)
    assert len(rows) and rows.min() >= 24 and rows.max() < 64 and columns.min() >= 48 and columns.max() < 96
    first, second, seen = read_both(*layers, (30, 20, 100, 90))
    assert (first[~seen] == 0).all() and (second[~seen] == 0).all() and np.array_equal(~seen, unseen[20:90, 30:100])


def test_tiles_without_data_are_not_looked_at(detector, pair, tmp_path, monkeypatch):
    describer, looked = Describer(*load(str(detector))), []
    maps = describer.tile_maps
    monkeypatch.setattr(describer, "tile_maps", lambda parts: looked.extend(parts) or maps(parts))

    def spoil(before, after):
        before[:60] = 0

    found(describer, pair(spoil), tmp_path / "kept")
    assert 0 < len(looked) <= len(tile_boxes(150, 97, TILE)) / 2
