"""Pictures: mask files, and for people a mask over its image, heat maps, sheets of many pairs, bar charts."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from kcfi.processing import NO_LABEL, ChangeReport, InputError

# What the grey values of a mask file mean. LEVIR-CD masks use the first and the last only.
MASK_BACKGROUND = 0
MASK_ROAD = 128
MASK_BUILDING = 255

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
        InputError: If the sizes differ.
    """
    values = np.asarray(mask)
    if values.shape != (image.height, image.width):
        raise InputError(
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
        InputError: If the sizes differ.
    """
    if values.shape != (image.height, image.width):
        raise InputError(
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
        InputError: If there are no rows, or captions do not match them.
    """
    if not rows:
        raise InputError("contact_sheet: no rows to show")
    if captions is not None and len(captions) != len(rows):
        raise InputError(f"contact_sheet: {len(captions)} captions for {len(rows)} rows")
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


@dataclass(frozen=True)
class Bar:
    """A bar of `bar_chart`.

    Args:
        group: Name of the group it belongs to; bars of one group follow each other.
        label: Text at its left.
        value: Its length, at least 0; None where there is nothing to show.
        spread: Half the length of the whisker at its end, in the unit of `value`.
        reference: Value to compare with, drawn as a mark; None for no mark.
    """

    group: str
    label: str
    value: float | None
    spread: float = 0.0
    reference: float | None = None


def bar_chart(bars: Sequence[Bar], title: str) -> Image.Image:
    """Draw horizontal bars from 0 on, on white, with a whisker, a mark and the value in figures.

    Args:
        bars: From top to bottom.
        title: Text above them; its line breaks are kept.

    Raises:
        InputError: If there are no bars.
    """
    if not bars:
        raise InputError("bar_chart: no bars to show")
    left, length, line = 330, 460, 24  # px: where bars begin, the longest one, height of a line
    header = 16 + line * (title.count("\n") + 1)
    ends = [end for bar in bars for end in ((bar.value or 0) + bar.spread, bar.reference or 0)]
    scale = length / (max(ends) or 1)
    groups = [bar.group for bar in bars]
    chart = Image.new("RGB", (left + length + 110, header + line * (len(bars) + len(set(groups))) + 10), "white")
    draw, font = ImageDraw.Draw(chart), ImageFont.load_default(13)
    draw.multiline_text((10, 10), title, "black", font, spacing=6)
    y = header
    for index, bar in enumerate(bars):
        if bar.group not in groups[:index]:
            draw.text((10, y + 4), bar.group, "black", font)
            y += line
        draw.text((30, y + 4), textwrap.shorten(bar.label, 44, placeholder=" ..."), "black", font)
        if bar.value is not None:
            end = left + scale * bar.value
            draw.rectangle((left, y + 4, end, y + line - 5), CHANGE_COLOURS[1])
            draw.line((end - scale * bar.spread, y + line / 2, end + scale * bar.spread, y + line / 2), "black", 2)
        if bar.reference is not None:
            mark = left + scale * bar.reference
            draw.line((mark, y + 1, mark, y + line - 2), CHANGE_COLOURS[2], 3)
        text = "-" if bar.value is None else f"{bar.value:.2f}"
        draw.text((left + length + 20, y + 4), text, "black", font)
        y += line
    return chart


def mask_picture(mask: NDArray[np.uint8], num_classes: int) -> Image.Image:
    """Class ids (H, W) -> grey values of LEVIR-MCI's masks: 0, 128 road, 255 building (or change).

    Pixels that the model did not see are 0.
    """
    values = np.zeros(256, np.uint8)
    values[1:num_classes] = [MASK_BUILDING] if num_classes == 2 else [MASK_ROAD, MASK_BUILDING]
    return Image.fromarray(values[mask])


def save_pictures(
    report: ChangeReport, after: Image.Image, output: Path, name: str, num_classes: int, heatmap: bool = False
) -> dict[str, str]:
    """Write what there is to see of a pair as OUTPUT/NAME_mask.png, NAME_overlay.png and NAME_heatmap.png.

    Args:
        report: of the pair.
        after: its later image.
        output: folder, which exists.
        name: of the pair.
        num_classes: of the model's mask.
        heatmap: also draw the strength of the key change features.

    Returns:
        The paths, by kind; no mask and no overlay without a change detection head.
    """
    pictures = {}
    if report.mask is not None:
        pictures["mask"] = mask_picture(report.mask, num_classes)
        pictures["overlay"] = overlay(after, np.where(report.mask == NO_LABEL, 0, report.mask))
    if heatmap:
        pictures["heatmap"] = heat_map(after, report.key_changes)
    paths = {kind: output / f"{name}_{kind}.png" for kind in pictures}
    for kind, picture in pictures.items():
        picture.save(paths[kind], compress_level=1)  # a third of the time, for photographs hardly larger
    return {kind: str(path) for kind, path in paths.items()}
