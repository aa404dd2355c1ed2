import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS

from kcfi.scenes.findings import Grid
from kcfi.scenes.rasters import BLOCK, LINES, NewRaster

GRID = Grid(CRS.from_epsg(32650), Affine(0.5, 0, 5e5, 0, -0.5, 4.4e6), 700, 1300, (0.5, 0.5))


def write(path, values, lines):
    with NewRaster(path, GRID, "uint8", 255, 0.01) as raster:
        for top in range(0, len(values), lines):
            raster.write(values[top : top + lines])
    return path.read_bytes()


def test_the_bytes_do_not_depend_on_how_many_lines_come_at_a_time(tmp_path):
    values = np.random.default_rng(0).integers(0, 101, (GRID.height, GRID.width), dtype=np.uint8)
    files = [write(tmp_path / f"{lines}.tif", values, lines) for lines in (17, BLOCK, 1300)]
    assert files[0] == files[1] == files[2]
    with rasterio.open(tmp_path / "17.tif") as file:
        assert np.array_equal(file.read(1), values)
        assert (file.crs, file.transform, file.nodata, file.scales) == (GRID.crs, GRID.transform, 255, (0.01,))
        assert file.block_shapes == [(BLOCK, BLOCK)]


def test_a_raster_to_be_read_by_lines_has_blocks_of_lines(tmp_path):
    values = np.arange(GRID.height, dtype=np.int32)[:, None].repeat(GRID.width, 1)
    with NewRaster(tmp_path / "lines.tif", GRID, "int32", by_lines=True) as raster:
        raster.write(values)
    with rasterio.open(tmp_path / "lines.tif") as file:
        assert file.block_shapes == [(LINES, GRID.width)] and np.array_equal(file.read(1), values)


def test_a_raster_that_was_not_finished_has_not_its_name(tmp_path):
    with pytest.raises(KeyboardInterrupt), NewRaster(tmp_path / "mask.tif", GRID, "uint8") as raster:
        raster.write(np.zeros((100, GRID.width), np.uint8))
        raise KeyboardInterrupt
    assert not (tmp_path / "mask.tif").exists()
