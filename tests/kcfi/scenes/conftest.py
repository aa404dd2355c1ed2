import numpy as np
import pytest
import rasterio
from affine import Affine
from scipy import ndimage

UTM = Affine(0.5, 0, 500_000, 0, -0.5, 4_400_000)  # with EPSG:32650


def save_raster(path, pixels, crs="EPSG:32650", transform=UTM, nodata=None, **profile):
    """Write (H, W) or (H, W, C) as a GeoTIFF; `crs=None` gives a plain image."""
    bands = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    count, height, width = bands.shape
    place = {} if crs is None else {"crs": crs, "transform": transform}
    profile = {"driver": "GTiff", "dtype": bands.dtype, "nodata": nodata, **place, **profile}
    with rasterio.open(path, "w", width=width, height=height, count=count, **profile) as file:
        file.write(bands)
    return path


@pytest.fixture
def write_raster():
    return save_raster


def draw_texture(height, width, seed=0):
    """Smooth random colours (H, W, 3), uint8: what survives being resampled."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (2, 2, 0), mode="wrap")
    return (128 + 40 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)


@pytest.fixture
def texture():
    return draw_texture
