"""Two images -> what the page shows of them: pure functions of a pair, a threshold and nothing else."""

import io
import json
import zipfile
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kcfi.pictures import CHANGE_COLOURS, mask_picture, overlay
from kcfi.processing import NO_LABEL, ChangeReport, Describer
from kcfi.processing.reading_kcfi import read_pair

SHOWN = 1024  # px: longest side of what the browser gets; the zip holds all pixels
NAMES = {2: ("change",), 3: ("road", "building")}  # classes of change, from 1, by the number of classes of a mask


@dataclass(frozen=True)
class Answer:
    """A described pair of H x W images.

    Args:
        before: RGB.
        after: RGB, of the same size.
        report: of the `Describer`, with probabilities.
        names: of the classes of change, the first has the id 1.
        metres: that a pixel is wide if the pair is as large-scale as the model's training images; None = not known.
        model: its name.
    """

    before: Image.Image
    after: Image.Image
    report: ChangeReport
    names: tuple[str, ...]
    metres: float | None
    model: str

    @property
    def size(self) -> int:
        """Bytes in memory: two images of three, the report's maps of 4 + 4 + 1 + 1 bytes a pixel."""
        return 16 * self.before.width * self.before.height

    def close(self) -> None:
        """Nothing to do: memory alone."""


def describe_pair(describer: Describer, before: str, after: str, model: str) -> Answer:
    """Describe two files.

    Args:
        describer: of a model with a change detection head.
        before: path of the earlier image.
        after: path of the later one, of the same size.
        model: its name, for the zip.

    Raises:
        InputError: a pair that `read_pair` refuses.
    """
    pair = read_pair(before, after, **describer.reading())
    [report] = describer.describe_pairs([pair])
    names = NAMES[describer.model.config.num_change_classes]
    return Answer(*pair, report, names, describer.processor.ground_sampling_distance, model)


def mask_at(report: ChangeReport, threshold: float) -> NDArray[np.uint8]:
    """Class ids (H, W) where the probability of change is at least `threshold`; 0 elsewhere, 255 where not seen."""
    assert report.mask is not None and report.probabilities is not None and report.classes is not None
    changed = report.probabilities >= threshold
    return np.where(report.mask == NO_LABEL, NO_LABEL, changed * report.classes).astype(np.uint8)


def overlay_at(answer: Answer, threshold: float) -> Image.Image:
    """The mask over the later image."""
    mask = mask_at(answer.report, threshold)
    return overlay(answer.after, np.where(mask == NO_LABEL, 0, mask))


def views(answer: Answer, threshold: float, masked: bool) -> tuple[Image.Image, Image.Image]:
    """Both dates for the slider, the later one under its mask if `masked`, no side above `SHOWN`."""
    pair = answer.before.copy(), overlay_at(answer, threshold) if masked else answer.after.copy()
    for image in pair:
        image.thumbnail((SHOWN, SHOWN))
    return pair


def areas(answer: Answer, threshold: float) -> list[dict[str, str | int | float | None]]:
    """A row per class of change: name, pixels, share of the pixels that the model saw, m² (None: not known)."""
    mask = mask_at(answer.report, threshold)
    seen = max(1, int((mask != NO_LABEL).sum()))
    counts = np.bincount(mask.ravel(), minlength=NO_LABEL + 1)
    square = None if answer.metres is None else answer.metres**2
    return [
        {"class": name, "pixels": int(count), "share": count / seen, "m2": None if square is None else count * square}
        for name, count in zip(answer.names, counts[1:], strict=False)
    ]


def sentence_html(answer: Answer) -> str:
    """The sentence and how sure it is; the model's words are escaped."""
    report = answer.report
    assert report.changed_probability is not None
    left, top, right, bottom = report.caption_box
    part = ""
    if (right - left, bottom - top) != answer.before.size:
        part = f"<p>It tells of the part that changed most: x {left} to {right}, y {top} to {bottom}.</p>"
    words = "" if report.score is None else f"<dt>sure of the words</dt><dd>{report.score:.0%}</dd>"
    return (
        f'<p class="sentence">{escape(report.caption)}</p>{part}<dl class="sure"><dt>sure that anything changed</dt>'
        f'<dd>{report.changed_probability:.0%}<meter min="0" max="1" value="{report.changed_probability:.3f}"></meter>'
        f"</dd>{words}</dl>"
    )


def areas_html(answer: Answer, threshold: float, link: str) -> str:
    """The table of the classes, and the link to everything as a zip."""
    rows = areas(answer, threshold)
    metres = "" if answer.metres is None else f"<th>m² at {answer.metres:g} m/px</th>"
    lines = "".join(
        f'<tr><th><i style="background: rgb{CHANGE_COLOURS[number]}"></i>{escape(str(row["class"]))}</th>'
        f"<td>{row['share']:.1%}</td><td>{row['pixels']:,}</td>"
        + ("" if row["m2"] is None else f"<td>{row['m2']:,.0f}</td>")
        + "</tr>"
        for number, row in enumerate(rows, start=1)
    )
    return (
        f'<table class="areas"><thead><tr><th>class</th><th>share</th><th>pixels</th>{metres}</tr></thead>'
        f'<tbody>{lines}</tbody></table><a class="download" href="{escape(link)}" download>Download all as a zip</a>'
    )


def without_folders(text: str, *paths: str) -> str:
    """A text with the names of files in place of their paths."""
    for path in paths:
        text = text.replace(path, Path(path).name)
    return text


def write_zip(answer: Answer, threshold: float, to: IO[bytes]) -> None:
    """Both images, mask, overlay and probabilities (PNG, 255 = certain), and the answer as JSON."""
    report = answer.report
    assert report.probabilities is not None
    pictures = {
        "before": answer.before,
        "after": answer.after,
        "mask": mask_picture(mask_at(report, threshold), 1 + len(answer.names)),
        "overlay": overlay_at(answer, threshold),
        "probability": Image.fromarray((report.probabilities * 255).round().astype(np.uint8)),
    }
    told = {
        "caption": report.caption,
        "caption_box": report.caption_box,
        "score": report.score,
        "changed_probability": report.changed_probability,
        "threshold": threshold,
        "areas": areas(answer, threshold),
        "model": answer.model,
        "kcfi": version("kcfi"),
    }
    with zipfile.ZipFile(to, "w") as archive:  # PNGs are compressed already
        for name, picture in pictures.items():
            file = io.BytesIO()
            picture.save(file, "PNG")
            archive.writestr(f"{name}.png", file.getvalue())
        archive.writestr("answer.json", json.dumps(told, indent=2) + "\n")
