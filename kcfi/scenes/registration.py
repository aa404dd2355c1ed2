"""How far two dates of a scene lie from each other: phase correlation on windows with texture.

The normalised cross-power spectrum of two images that are shifted against each other is a plane wave, whose inverse
transform is a peak at the shift (Kuglin and Hines, 1975). Its place is refined to `1 / FINE` px by the matrix product
of Guizar-Sicairos, Thurman and Fienup (Optics Letters 33, 2008), which evaluates the inverse transform around it.
"""

from itertools import product

import numpy as np
from numpy.typing import NDArray

from kcfi.scenes.findings import Grid, Shift
from kcfi.scenes.reading import Layer

WINDOW = 256  # px: side of a window; shifts of up to a quarter of it are found
NARROWEST = 64  # px: side of the smallest one
PER_SIDE = 6  # windows across and down a scene, at most
TEXTURE = 4.0  # grey levels: standard deviation below which a window shows nothing to hold on to
FOUND = 8.0  # standard deviations of the correlation above its mean: noise alone has peaks of up to 7
FINE = 50  # steps per px
SMOOTH = 0.15  # cycles per px: width of the low pass; what is finer is noise, and aliased after resampling
FAR = 2.0  # px: more than this is said in a warning
ALIKE = 1.0  # px: spread up to which the shift is the same everywhere


def estimate_shift(before: Layer, after: Layer, grid: Grid) -> Shift:
    """The shift of a date from another: median over windows with texture, and its spread.

    A scene narrower than `NARROWEST` has no window: it shows too little to tell a shift from a change.
    """
    side = min(WINDOW, grid.width, grid.height)
    shifts = []
    for left, top in product(_starts(grid.width, side), _starts(grid.height, side)) if side >= NARROWEST else ():
        box = (left, top, left + side, top + side)
        (first, there), (second, too) = before.read(box), after.read(box)
        if not (there & too).all():
            continue
        shift = shift_between(first.mean(2), second.mean(2))
        if shift is not None:
            shifts.append(shift)
    if not shifts:
        return Shift(0.0, 0.0, 0.0, 0)
    found = np.array(shifts)
    middle: NDArray[np.float64] = np.median(found, axis=0)
    spread = float(np.median(np.hypot(*(found - middle).T)))
    return Shift(round(float(middle[0]), 2), round(float(middle[1]), 2), round(spread, 2), len(shifts))


def shift_between(before: NDArray[np.floating], after: NDArray[np.floating]) -> tuple[float, float] | None:
    """Shift (x, y) in px: what `before` shows at a place, `after` shows that far to the right and down.

    None: an image without texture, or no clear peak.

    Args:
        before: (H, W) grey.
        after: (H, W) grey.
    """
    if min(before.std(), after.std()) < TEXTURE:
        return None
    height, width = before.shape
    taper = np.hanning(height)[:, None] * np.hanning(width)
    first, second = (np.fft.fft2((image - image.mean()) * taper) for image in (before, after))
    cross = second * first.conj()
    y, x = np.fft.fftfreq(height), np.fft.fftfreq(width)
    low_pass = np.exp(-0.5 * (y[:, None] ** 2 + x**2) / SMOOTH**2)
    cross *= low_pass / np.maximum(np.abs(cross), np.finfo(np.float64).tiny)
    surface = np.fft.ifft2(cross).real
    near = (np.abs(y * height)[:, None] <= height / 4) & (np.abs(x * width) <= width / 4)
    row, column = np.unravel_index(int(np.where(near, surface, -np.inf).argmax()), surface.shape)
    if surface[row, column] < surface.mean() + FOUND * surface.std():
        return None
    around = np.arange(-FINE, FINE + 1) / FINE
    down, right = y[row] * height + around, x[column] * width + around
    fine = np.exp(2j * np.pi * np.outer(down, y)) @ cross @ np.exp(2j * np.pi * np.outer(x, right))
    best = np.unravel_index(int(fine.real.argmax()), fine.shape)
    return float(right[best[1]]), float(down[best[0]])


def _starts(length: int, side: int) -> list[int]:
    """Where windows begin, evenly."""
    count = min(PER_SIDE, length // side)
    return [int(start) for start in np.linspace(0, length - side, count).round()]
