"""Rasters on the grid of a scene that are written from the top, some lines at a time."""

import os
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from kcfi.scenes.findings import Grid

BLOCK = 512  # px: side of the tiles of the file; whole rows of them are written, so that the bytes are always the same
LINES = 8  # of a block of a file that is read line by line
CACHE = 64  # MiB that GDAL may keep of the rasters that are open


class NewRaster:
    """A GeoTIFF of one band, which has its name only once it is whole; a context manager.

    Args:
        path: of the file.
        grid: its size and place.
        dtype: of its values.
        nodata: value of pixels that are not seen; None = there are none.
        scale: what the values are to be multiplied by to be what they stand for.
        by_lines: laid out for being read line by line, which takes a hundred times as long of tiles.
    """

    def __init__(
        self,
        path: Path,
        grid: Grid,
        dtype: str,
        nodata: int | None = None,
        scale: float = 1.0,
        by_lines: bool = False,
    ) -> None:
        self._path, self._unfinished = path, path.with_name(f"unfinished-{path.name}")
        self._grid, self._scale, self._top = grid, scale, 0
        self._waiting = np.zeros((0, grid.width), dtype)
        profile = {"driver": "GTiff", "count": 1, "dtype": dtype, "width": grid.width, "height": grid.height}
        tiles = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}
        layout = {**({"blockysize": LINES} if by_lines else tiles), "compress": "deflate", "bigtiff": "if_safer"}
        place = {} if grid.crs is None else {"crs": grid.crs, "transform": grid.transform}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            self._file = rasterio.open(self._unfinished, "w", nodata=nodata, **profile, **layout, **place)

    def __enter__(self) -> "NewRaster":
        return self

    def write(self, lines: NDArray[Any]) -> None:
        """Write the next lines (h, W)."""
        self._waiting = np.concatenate([self._waiting, lines])
        whole = len(self._waiting) // BLOCK * BLOCK
        if self._top + len(self._waiting) == self._grid.height:
            whole = len(self._waiting)
        if whole:
            self._file.write(self._waiting[:whole], 1, window=Window(0, self._top, self._grid.width, whole))
            self._top, self._waiting = self._top + whole, self._waiting[whole:]

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if kind is None and self._scale != 1:
            self._file.scales = (self._scale,)
        self._file.close()
        if kind is None:
            os.replace(self._unfinished, self._path)
