"""Pictures for people: a mask over its image, sheets of many pairs."""

import textwrap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

# Colour of each mask value. Class ids (1, 2) and file values (128, 255) do not collide.
CHANGE_COLOURS = {1: (0, 200, 255), 2: (255, 96, 0), 128: (0, 200, 255), 255: (255, 96, 0)}


def overlay(image: Image.Image, mask: Image.Image | NDArray[np.integer], opacity: float = 0.4) -> Image.Image:
    """Draw the changed pixels over an image, outlined: roads (and "change" of two classes) blue, buildings orange.

    Args:
        image: Any mode; usually the after image.
        mask: (H, W) like the image. Values 0, 128 (road), 255 (building) of LEVIR-MCI files, or class ids 0, 1, 2.
        opacity: Of the filling, 0 to 1. The outline is opaque.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: If the sizes differ.
    """
    values = np.asarray(mask)
    if values.shape != (image.height, image.width):
        raise ValueError(
            f"overlay: the mask is {values.shape[1]} x {values.shape[0]} px, the image {image.width} x {image.height}"
        )
    pixels = np.asarray(image.convert("RGB"), np.float32).copy()
    for value, colour in CHANGE_COLOURS.items():
        inside = values == value
        edge = inside & ~ndimage.binary_erosion(inside, border_value=1)
        pixels[inside] += opacity * (np.array(colour) - pixels[inside])
        pixels[edge] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def heat_map(image: Image.Image, values: NDArray[np.floating]) -> Image.Image:
    """Draw how strong the key change features are (the paper's Fig. 1): blue = weak, red = strong.

    Args:
        image: Any mode; shown in grey below the colours.
        values: (H, W) like the image, any unit; drawn between their 2nd and 98th percentile.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: If the sizes differ.
    """
    if values.shape != (image.height, image.width):
        raise ValueError(
            f"heat_map: values for {values.shape[1]} x {values.shape[0]} px, the image {image.width} x {image.height}"
        )
    low, high = np.percentile(values, [2, 98])
    level = ((values - low) / max(float(high - low), 1e-12)).clip(0, 1)
    stops = [0, 0.35, 0.65, 1]
    ramp = np.array([(20, 30, 120), (0, 190, 200), (250, 220, 60), (220, 30, 20)])
    colours = np.stack([np.interp(level, stops, ramp[:, channel]) for channel in range(3)], axis=-1)
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    return Image.fromarray((0.35 * grey + 0.65 * colours).round().astype(np.uint8))


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    tile: int = 256,
) -> Image.Image:
    """Lay images out in rows, each with its text to the right, on white.

    Args:
        rows: Images of each row; they are resized to `tile` x `tile` px.
        captions: One text per row; its line breaks are kept.
        titles: One title per column of images.
        tile: Side of an image on the sheet in px.

    Raises:
        ValueError: If there are no rows, or captions do not match them.
    """
    if not rows:
        raise ValueError("contact_sheet: no rows to show")
    if captions is not None and len(captions) != len(rows):
        raise ValueError(f"contact_sheet: {len(captions)} captions for {len(rows)} rows")
    gap, header = 6, 22 if titles else 0
    text_width = 420 if captions else 0
    columns = max(len(row) for row in rows)
    sheet = Image.new(
        "RGB", (columns * (tile + gap) + text_width + gap, header + len(rows) * (tile + gap) + gap), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, title in enumerate(titles or ()):
        draw.text((gap + column * (tile + gap), 4), title, "black", font)
    for index, row in enumerate(rows):
        y = header + gap + index * (tile + gap)
        for column, image in enumerate(row):
            nearest = Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.BICUBIC
            sheet.paste(image.resize((tile, tile), nearest).convert("RGB"), (gap + column * (tile + gap), y))
        if captions:
            lines = [part for line in captions[index].splitlines() for part in textwrap.wrap(line, 62)]
            draw.multiline_text((gap + columns * (tile + gap), y), "\n".join(lines), "black", font, spacing=3)
    return sheet
