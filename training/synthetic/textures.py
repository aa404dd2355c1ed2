"""Textures of the synthetic scenes, and the cached noise they are made of.

Geometry, light and shadows are drawn by the other modules whatever the source of texture; a source only says what a
surface looks like.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Array = NDArray[np.float32]
TextureKind = Literal[
    "grass", "field", "soil", "woods", "water", "asphalt", "dirt", "concrete", "parking", "villa roof", "large roof"
]
NOISE_SIZE = 640  # px, side of the cached noise; every canvas is smaller


class Materials(Protocol):
    """Source of texture: `ProceduralMaterials`, or pictures of real surfaces."""

    def texture(self, kind: TextureKind, size: int, rng: np.random.Generator) -> Image.Image:
        """Return an RGB image, `size` x `size` px at 0.5 m/px, of one kind of surface under neutral light.

        Roof textures are multiplied by the shading of each roof; all others are shown as they are.
        """
        ...

    def roof(self, kind: TextureKind, rng: np.random.Generator) -> Image.Image | None:
        """Return a whole roof for one building, RGBA, its sides parallel to the image's; None: it has the texture."""
        ...


@dataclass(frozen=True)
class Surface:
    """A procedural surface: mean colours to choose from, and amplitudes of noise in grey levels."""

    colours: tuple[tuple[int, int, int], ...]
    smooth: float
    clumps: float
    fine: float
    tone: float = 0.0  # how far the smooth noise also moves the hue (grey levels, red against green)


SURFACES: dict[TextureKind, Surface] = {
    "grass": Surface(((92, 100, 66), (82, 98, 60), (104, 104, 72)), 6, 6, 6, 2.5),
    "field": Surface(((128, 112, 86), (112, 102, 84), (142, 122, 94), (104, 98, 80)), 6, 7, 7, 2.5),
    "soil": Surface(((190, 176, 148), (164, 154, 134), (204, 190, 162), (146, 140, 128)), 9, 6, 6, 2),
    "woods": Surface(((50, 64, 44), (44, 62, 48), (62, 70, 50)), 5, 8, 12, 3),
    "water": Surface(((58, 82, 82), (96, 88, 68), (46, 70, 62)), 4, 1, 2),
    "asphalt": Surface(((140, 138, 134), (120, 120, 120), (152, 149, 143)), 4, 2, 4),
    "dirt": Surface(((206, 190, 154), (188, 172, 140), (220, 206, 174)), 8, 7, 7),
    "concrete": Surface(((205, 200, 188), (190, 186, 176)), 3, 2, 4),
    "parking": Surface(((112, 112, 112), (132, 130, 126), (176, 172, 162)), 5, 3, 4),
    "villa roof": Surface(
        ((106, 101, 95), (92, 90, 88), (118, 110, 102), (96, 84, 74), (150, 96, 74), (168, 164, 158), (92, 98, 106)),
        3,
        4,
        9,
    ),
    "large roof": Surface(
        ((216, 216, 213), (190, 190, 186), (150, 147, 140), (124, 116, 108), (74, 76, 80), (122, 136, 146)), 5, 2, 4
    ),
}


@lru_cache(maxsize=1)
def noise_fields() -> dict[str, Array]:
    """Cached fields of mean 0 and deviation 1, (NOISE_SIZE, NOISE_SIZE), named after the size of their structures."""
    rng = np.random.default_rng(0)

    def smoothed(sigma: float) -> Array:
        field = ndimage.gaussian_filter(rng.standard_normal((NOISE_SIZE, NOISE_SIZE)), sigma, mode="wrap")
        return ((field - field.mean()) / field.std()).astype(np.float32)

    blobs = smoothed(20) + 0.45 * smoothed(6) + 0.2 * smoothed(2)
    return {
        "smooth": smoothed(26) + 0.5 * smoothed(9),
        "blobs": (blobs / blobs.std()).astype(np.float32),
        "clumps": smoothed(1.6) + 0.6 * smoothed(3.5),
        "fine": smoothed(0.55),
    }


def crop_noise(name: str, size: int, rng: np.random.Generator) -> Array:
    """A random window of a cached field, (size, size)."""
    x, y = rng.integers(0, NOISE_SIZE - size, 2)
    return noise_fields()[name][y : y + size, x : x + size]


@lru_cache(maxsize=len(SURFACES) * 4)
def _surface_image(kind: TextureKind, colour: int) -> Image.Image:
    """A cached sample of a surface in one of its colours, NOISE_SIZE px on a side."""
    surface, noise = SURFACES[kind], noise_fields()
    turn = 1 + colour + 4 * list(SURFACES).index(kind)

    def rolled(name: str, factor: int) -> Array:
        return np.roll(noise[name], (turn * 37 * factor, turn * 61 * factor), (0, 1))

    smooth = rolled("smooth", 1)
    relief = surface.smooth * smooth + surface.clumps * rolled("clumps", 2) + surface.fine * rolled("fine", 3)
    hue = surface.tone * rolled("smooth", 5)
    pixels = np.stack([relief + hue, relief - 0.4 * hue, relief - 0.6 * hue], -1) + np.array(surface.colours[colour])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class ProceduralMaterials:
    """Built-in textures: a colour and three scales of noise per surface. Needs no files."""

    def texture(self, kind: TextureKind, size: int, rng: np.random.Generator) -> Image.Image:
        """See `Materials.texture`."""
        image = _surface_image(kind, int(rng.integers(len(SURFACES[kind].colours))))
        x, y = (int(i) for i in rng.integers(0, NOISE_SIZE - size, 2))
        return image.crop((x, y, x + size, y + size))

    def roof(self, kind: TextureKind, rng: np.random.Generator) -> Image.Image | None:
        """See `Materials.roof`."""
        return None
