"""Dates of a scene, read in windows of the common grid as 8-bit RGB; never as a whole."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from kcfi.processing import InputError, refusing
from kcfi.processing.places_kcfi import Box
from kcfi.processing.reading_kcfi import check_alpha, check_reading, choose_bands
from kcfi.scenes.findings import Grid
from kcfi.scenes.grid import is_north_up, name_of

STRETCH = (2.0, 98.0)  # percentiles that become black and white of what has more than 8 bits
SAMPLE = 1024  # px: longest side of the decimated copy that the stretch is measured on
ON_GRID = 0.01  # px: smaller offsets are none
ERROR = 0.02  # px that the warping may be off by
PIXELS = CRS.from_epsg(3857), Affine(1, 0, 1, 0, -1, -1)  # stand in for the coordinates of a plain image
# No format whose files name other files, or addresses, that GDAL then reads (VRT, WMS, STAC, Zarr ...).
DRIVERS = ["GTiff", "PNG", "JPEG", "JP2OpenJPEG", "WEBP", "BMP", "GIF", "HFA", "ENVI", "AAIGrid"]
View = tuple[NDArray[np.uint8], NDArray[np.bool_]]  # RGB (H, W, 3), and where there is data (H, W)


def open_raster(path: str | Path) -> Any:
    """Open a raster that GDAL knows; nothing but its header is read.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it cannot be read as a raster, names other files, or is a photograph that lies on its side.
    """
    name = str(path)
    if not name.startswith("/vsi") and "://" not in name:
        Path(path).stat()
    with refusing(f"{path}: cannot be read as a raster"), warnings.catch_warnings(), rasterio.Env():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        source = DatasetReader(path, driver=DRIVERS)  # `rasterio.open` takes one driver or all
    if source.tags().get("EXIF_Orientation", "1") != "1":
        raise InputError(f"{path}: its EXIF tag says that it lies on its side; save it upright first.")
    if source.tags(ns="OVERVIEWS"):  # a file or an address, which GDAL would open to read the image reduced
        raise InputError(f"{path}: names other files as its overviews; write it anew with `gdal_translate -nomd`.")
    return source


class Layer:
    """A date on the grid of its scene.

    Args:
        source: dataset of `open_raster`.
        grid: of the scene.
        bands: which are red, green and blue, counted from 1; None = the one or three that there are besides alpha.
        stretch: percentiles that become black and white, of each band of the whole scene; None = `STRETCH` for what
            has other than 8 bits.
        offset: px of the grid, to the right and down, by which this date lies off; taken out.
        nodata: value, in all bands, of pixels without data of a file that does not say it.

    Attributes:
        notes: what was done to bring it onto the grid.

    Raises:
        InputError: it is not known which bands are the colours, or they are indices of a palette or complex.
    """

    def __init__(
        self,
        source: Any,
        grid: Grid,
        bands: Sequence[int] | None = None,
        stretch: Sequence[float] | None = None,
        offset: tuple[float, float] = (0.0, 0.0),
        nodata: float | None = None,
    ) -> None:
        check_reading(bands, stretch)
        self.source, self.grid, self.offset = source, grid, offset
        self.nodata = nodata if source.nodata is None else None
        alpha = [band for band in source.indexes if source.colorinterp[band - 1] == ColorInterp.alpha]
        colours = [band for band in source.indexes if band not in alpha]
        if bands is None:
            self.bands = [colours[place] for place in choose_bands(len(colours), None, source.name)]
        else:
            self.bands = [place + 1 for place in choose_bands(source.count, bands, source.name)]
        if any(source.colorinterp[band - 1] == ColorInterp.palette for band in self.bands):
            raise InputError(f"{source.name}: its values are indices of a palette: `gdal_translate -expand rgb` it.")
        if any("complex" in source.dtypes[band - 1] for band in self.bands):
            raise InputError(
                f"{source.name}: its values are complex numbers: make an image of their amplitude first "
                f"(`gdal_translate DERIVED_SUBDATASET:AMPLITUDE:{source.name} amplitude.tif`)."
            )
        self._first = self._place_in_source()  # None = read through a WarpedVRT
        self._dataset = source if self._first is not None else self._warped(grid, Resampling.bilinear)
        self._limits: NDArray[np.float64] | None = None
        self.notes = self._geometry_notes()
        if alpha and bands is None:
            with refusing(f"{source.name}: cannot be read"):
                values = source.read(alpha[0], out_shape=_decimated(source.shape, SAMPLE))
            check_alpha(values / (np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1), source.name)
        if stretch is not None or any(source.dtypes[band - 1] != "uint8" for band in self.bands):
            low, high = stretch or STRETCH
            values, seen = self._decimate(SAMPLE, Resampling.nearest)
            counted = values[:, seen] if seen.any() else np.zeros((len(values), 1))
            self._limits = np.percentile(counted, [low, high], axis=1, method="nearest").T.astype(np.float64)
            ranges = ", ".join(f"{a:g} to {b:g}" for a, b in self._limits)
            self.notes.append(f"stretched to 8 bits from its percentiles {low:g} to {high:g} ({ranges})")

    def read(self, box: Box) -> View:
        """RGB, and where there is data, of a window of the grid; black where there is none."""
        left, top, right, bottom = box
        x, y = self._first or (0, 0)
        window = Window(left + x, top + y, right - left, bottom - top)
        with refusing(f"{self.source.name}: cannot be read at {box}"):
            values = self._dataset.read(self.bands, window=window)
            return self._show(values, self._seen(values, self._dataset.dataset_mask(window=window)))

    def overview(self, longest: int) -> View:
        """The whole scene, reduced so that its longer side is at most `longest` px."""
        return self._show(*self._decimate(longest, Resampling.average))

    def _show(self, values: NDArray[Any], seen: NDArray[np.bool_]) -> View:
        """Values (1 or 3, H, W) of the bands -> 8-bit RGB."""
        if self._limits is not None:
            seen = seen & np.isfinite(values).all(0)
            raw, values = values, np.zeros(values.shape, np.uint8)
            for band, shown, (low, high) in zip(
                raw, values, self._limits, strict=True
            ):  # all at once take 24 bytes a px
                shares = (np.where(seen, band, low) - low) / max(high - low, np.finfo(np.float32).tiny)
                shown[...] = np.rint(shares.clip(0, 1) * 255)
        colours = np.broadcast_to(np.where(seen, values, np.uint8(0)), (3, *seen.shape))
        return np.ascontiguousarray(colours.transpose(1, 2, 0)), seen

    def _decimate(self, longest: int, how: Resampling) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Values of the bands and where there is data, of the whole grid, reduced."""
        height, width = _decimated((self.grid.height, self.grid.width), longest)
        with refusing(f"{self.source.name}: cannot be read"):
            if self._first is not None:
                at = {"window": Window(*self._first, self.grid.width, self.grid.height)}
                values = self.source.read(self.bands, out_shape=(len(self.bands), height, width), resampling=how, **at)
                mask = self.source.dataset_mask(out_shape=(height, width), **at)
            else:
                scale = Affine.scale(self.grid.width / width, self.grid.height / height)
                coarse = Grid(self.grid.crs, self.grid.transform @ scale, width, height, None)
                with self._warped(coarse, how) as dataset:
                    values, mask = dataset.read(self.bands), dataset.dataset_mask()
        return values, self._seen(values, mask) & np.isfinite(values).all(0)

    def _seen(self, values: NDArray[Any], mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Where there is data, by GDAL's mask and by `nodata`."""
        return mask > 0 if self.nodata is None else (mask > 0) & (values != self.nodata).any(0)

    def _place_in_source(self) -> tuple[int, int] | None:
        """Column and row of the source where the grid begins, if its pixels are the grid's."""
        if self.offset != (0.0, 0.0) or self.source.crs != self.grid.crs:
            return None
        if self.grid.crs is None:
            return 0, 0
        step = ~self.source.transform @ self.grid.transform
        column, row = round(step.c), round(step.f)
        corner = step @ (self.grid.width, self.grid.height)
        off = (step.c - column, step.f - row, corner[0] - column - self.grid.width, corner[1] - row - self.grid.height)
        return (column, row) if max(map(abs, off)) < ON_GRID and is_north_up(self.source.transform) else None

    def _warped(self, grid: Grid, how: Resampling) -> WarpedVRT:
        """The source on a grid."""
        plain = grid.crs is None
        there = PIXELS[1] @ grid.transform if plain else grid.transform
        x, y = (move * grid.width / self.grid.width for move in self.offset)
        masked = self.source.nodata is not None or ColorInterp.alpha in self.source.colorinterp
        missing = (
            {"add_alpha": not masked} if self.nodata is None else dict.fromkeys(("src_nodata", "nodata"), self.nodata)
        )
        with refusing(f"{self.source.name}: cannot be brought onto the grid"):
            return WarpedVRT(
                self.source,
                src_crs=PIXELS[0] if plain else None,
                src_transform=PIXELS[1] if plain else None,
                crs=PIXELS[0] if plain else grid.crs,
                transform=there @ Affine.translation(x, y),
                width=grid.width,
                height=grid.height,
                resampling=how,
                tolerance=ERROR,
                **missing,
            )

    def _geometry_notes(self) -> list[str]:
        """What was done to bring the source onto the grid."""
        notes, source, grid = [], self.source, self.grid
        if self.offset != (0.0, 0.0):
            notes.append(f"moved by {-self.offset[0]:+.2f} px across and {-self.offset[1]:+.2f} px down to be aligned")
        if grid.crs is None:
            return notes
        if source.crs != grid.crs:
            return [f"reprojected from {name_of(source.crs)} to {name_of(grid.crs)}", *notes]
        if not is_north_up(source.transform):
            notes.append("turned so that its rows run from west to east, from the north down")
        step = ~source.transform @ grid.transform
        sizes = [1 / np.hypot(step.a, step.d), 1 / np.hypot(step.b, step.e)]  # of its pixels, in px of the grid
        if any(abs(size - 1) > 1e-6 for size in sizes):
            across, down = (size * m for size, m in zip(sizes, grid.metres or (1.0, 1.0), strict=True))
            was = f"{across:.3g}" if abs(across / down - 1) < ON_GRID else f"{across:.3g} x {down:.3g}"
            notes.append(f"resampled from {was} to {(grid.metres or (1.0,))[0]:.3g} m/px")
        x, y = (abs(place - round(place)) for place in (step.c, step.f))
        if not notes and max(x, y) > ON_GRID:
            notes.append(f"resampled: its pixels lie between those of the grid, by {x:.2f} px across and {y:.2f} down")
        share = abs(step.determinant) * grid.width * grid.height / (source.width * source.height)
        if share < 1 - ON_GRID:
            notes.append(f"cut to the ground that all dates cover, {share:.0%} of it")
        return notes


def _decimated(shape: tuple[int, int], longest: int) -> tuple[int, int]:
    """Height and width, reduced so that the longer one is at most `longest`."""
    factor = min(1, longest / max(shape))
    return max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))
