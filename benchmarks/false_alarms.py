"""What a model marks where nothing changed, and how far its mask probabilities can be believed.

    python benchmarks/false_alarms.py --materials LIBRARY [--model kcfi-tiny] [--split val] [--num_pairs 100]

Per kind of pair (drawn; composed, single_date and developed with a library of `kcfi data materials`), all x 100 and
over pixels: `f1` of the change mask; `standing`, the share of buildings that stand at both dates which is marked as
changed; `unchanged`, the marked share of unchanged pairs; `ece`, the expected calibration error of the probability of
change (ten bins; arXiv 1706.04599); `confidence - truth`, its sign (above 0 = overconfident).
"""

import argparse
import json
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kcfi.models import load
from kcfi.training.collator import KCFICollator
from kcfi.training.synthetic.dataset import SyntheticDataset
from kcfi.training.synthetic.material_library import LibraryMaterials

BINS = 10


@torch.no_grad()
def measure(model: Any, processor: Any, pairs: SyntheticDataset) -> dict[str, float | None]:
    """The scores of the module's description for one kind of pairs."""
    classes = "road_building" if model.config.num_change_classes == 3 else "change"
    loader = DataLoader(pairs, batch_size=4, collate_fn=KCFICollator(processor, classes, train=False))
    counts = {name: np.zeros(2) for name in ("standing", "unchanged")}  # marked, all
    hits = np.zeros(3)  # true and marked, true, marked
    bins = np.zeros((BINS, 3))  # pixels, sum of probabilities, truly changed
    index = 0
    for batch in loader:
        logits = model.get_image_features(batch["pixel_values"].to(model.device, model.dtype)).mask_logits
        marks = processor.post_process_masks(logits, batch["sizes"])
        logits = F.interpolate(logits.float(), size=tuple(batch["sizes"][0]), mode="bilinear")
        changes = 1 - logits.softmax(1)[:, 0].cpu().numpy()
        for mark, change, true in zip(marks, changes, batch["true_masks"], strict=True):
            marked, truth = mark.cpu().numpy() > 0, np.asarray(true) > 0
            hits += (marked & truth).sum(), truth.sum(), marked.sum()
            if not truth.any():
                counts["unchanged"] += marked.sum(), marked.size
            stand = pairs.standing(index) & ~truth
            counts["standing"] += (marked & stand).sum(), stand.sum()
            level = (change * BINS).astype(int).clip(0, BINS - 1).ravel()
            for column, values in enumerate((np.ones(level.size), change.ravel(), truth.ravel())):
                bins[:, column] += np.bincount(level, values, BINS)
            index += 1
    result: dict[str, float | None] = {"f1": 200 * hits[0] / (hits[1] + hits[2]) if hits[1] + hits[2] else None}
    for name, (marked, everything) in counts.items():
        result[name] = 100 * marked / everything if everything else None
    result["ece"] = 100 * float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum())
    result["confidence - truth"] = 100 * float((bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum())
    return {name: None if value is None else round(float(value), 2) for name, value in result.items()}


def main() -> None:
    """Measure each kind of pair and print one line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="kcfi-tiny")
    parser.add_argument("--materials", help="without it: drawn pairs only")
    parser.add_argument("--split", default="val")
    parser.add_argument("--num_pairs", type=int, default=100, help="of each kind")
    options = parser.parse_args()
    model, processor = load(options.model)
    library = LibraryMaterials(options.materials, options.split) if options.materials else None
    mix = SyntheticDataset(1, options.split, materials=library).mix  # of all kinds that the library allows
    for kind in [kind for kind, weight in mix.items() if weight]:
        pairs = SyntheticDataset(options.num_pairs, options.split, 0, materials=library, pair_mix={kind: 1})
        print(json.dumps({"pairs": kind, "number": len(pairs), **measure(model, processor, pairs)}), flush=True)


if __name__ == "__main__":
    main()
