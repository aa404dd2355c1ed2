"""Mask scores on real before/after images, folder of A/, B/ and label/ (0 = no change, else changed building).

    python benchmarks/real_pairs.py FOLDER [--model kcfi-tiny] [--output DIR]

Prints F1, IoU, precision and recall of the building class, accumulated over the images, beside the plain baseline that
marks every pixel as changed, and per image the generated sentence. `--output` writes a sheet of overlays.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

import kcfi  # noqa: F401 (registers the Auto classes)
from kcfi.captioning import Describer, load
from kcfi.pictures import contact_sheet, overlay
from kcfi.training.metrics import MaskScores


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="kcfi-tiny")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    model, processor = load(options.model)
    building = model.config.num_change_classes - 1
    describer = Describer(model, processor)
    ours, everything, rows, captions = MaskScores("building"), MaskScores("building"), [], []
    for label in sorted((options.folder / "label").glob("*.png")):
        before, after = (Image.open(options.folder / date / label.name).convert("RGB") for date in "AB")
        truth = (np.asarray(Image.open(label).convert("L")) > 0).astype(np.uint8)
        report = describer.describe(before, after)
        predicted = (report.mask == building).astype(np.uint8)
        ours.update(predicted, truth)
        everything.update(np.ones_like(truth), truth)
        rows.append([before, after, overlay(after, truth * 255), overlay(after, report.mask)])
        captions.append(f"{label.name}\n{report.caption}")
        print(f"{label.name}: {report.caption}")
    for name, scores in (("model", ours.compute()), ("everything changed", everything.compute())):
        kept = {score: round(scores[score]["building"], 1) for score in ("f1", "iou", "precision", "recall")}
        print(json.dumps({"mask": name, "images": len(rows), **kept}))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        sheet = contact_sheet(rows, captions, ["before", "after", "true change", "predicted"])
        sheet.save(options.output / "real_pairs.png")


if __name__ == "__main__":
    main()
