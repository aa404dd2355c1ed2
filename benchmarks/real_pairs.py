"""Mask scores on real before/after images: folders of A/, B/ and label/ (0 = no change, else changed building).

    python benchmarks/real_pairs.py FOLDER [FOLDER ...] [--model kcfi-tiny] [--leave_out NAME ...] [--scale FACTOR]
        [--output DIR]

Prints F1, IoU, precision and recall of the building class, accumulated over the images of each folder and over all of
them, beside the plain baseline that marks every pixel as changed, and per image the generated sentence. `--leave_out`
names images that are part of another one: they count in their folder, not over all. `--scale 0.5` halves width and
height first, to bring images to the m per pixel that the model was trained at. `--output` writes a sheet of
overlays per folder.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

import kcfi  # noqa: F401 (registers the Auto classes)
from kcfi.models import load
from kcfi.pictures import contact_sheet, overlay
from kcfi.processing import Describer
from kcfi.training.data.levir_cc import warn_of_levir_cd
from kcfi.training.scoring.metrics import MaskScores


class Counts:
    """Scores of a model, and of marking everything, over some images."""

    def __init__(self) -> None:
        self.images = 0
        self.masks = {"model": MaskScores("building"), "everything changed": MaskScores("building")}

    def update(self, predicted: np.ndarray, truth: np.ndarray) -> None:
        """Count an image."""
        self.images += 1
        self.masks["model"].update(predicted, truth)
        self.masks["everything changed"].update(np.ones_like(truth), truth)

    def print(self, folder: str) -> None:
        """One line of JSON for each."""
        for name, masks in self.masks.items():
            scores = masks.compute()
            assert scores is not None  # every image has a label
            kept = {score: round(scores[score]["building"], 1) for score in ("f1", "iou", "precision", "recall")}
            print(json.dumps({"folder": folder, "mask": name, "images": self.images, **kept}))


def scaled(image: Image.Image, factor: float) -> Image.Image:
    """An image with its width and height times a factor."""
    size = (round(image.width * factor), round(image.height * factor))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--model", default="kcfi-tiny")
    parser.add_argument("--leave_out", nargs="+", default=[], help="file names without ending")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    model, processor = load(options.model)
    building = model.config.num_change_classes - 1
    describer = Describer(model, processor)
    everywhere, unseen = Counts(), set(options.leave_out)
    for folder in options.folders:
        counts, rows, captions = Counts(), [], []
        labels = sorted((folder / "label").glob("*.png"))
        if not labels:
            parser.error(f"{folder / 'label'} holds no .png")
        unseen -= {label.stem for label in labels}
        warn_of_levir_cd(label.name for label in labels)
        for label in labels:
            images = (Image.open(folder / date / label.name).convert("RGB") for date in "AB")
            before, after = (scaled(image, options.scale) for image in images)
            marked = Image.open(label).convert("L").point(lambda value: 255 * (value > 0))
            truth = (np.asarray(scaled(marked, options.scale)) > 127).astype(np.uint8)
            report = describer.describe(before, after)
            predicted = (report.mask == building).astype(np.uint8)
            counts.update(predicted, truth)
            if label.stem not in options.leave_out:
                everywhere.update(predicted, truth)
            rows.append([before, after, overlay(after, truth * 255), overlay(after, report.mask)])
            captions.append(f"{label.name}\n{report.caption}")
            print(f"{label.name}: {report.caption}")
        counts.print(str(folder))
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            sheet = contact_sheet(rows, captions, ["before", "after", "true change", "predicted"])
            sheet.save(options.output / f"{'_'.join(folder.parts[-2:])}.png")
    if unseen:
        parser.error(f"--leave_out {', '.join(sorted(unseen))}: no such image")
    if len(options.folders) > 1:
        everywhere.print("all")


if __name__ == "__main__":
    main()
