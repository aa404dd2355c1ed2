"""Calibration: how far the probabilities of a model can be believed, measured on pairs with known truth and mended.

```
kcfi calibrate --model runs/paper --dataset /data/LEVIR-MCI --split val
```

Three things are fitted and saved with the processor (`Calibration`): the temperature of the mask, by the likelihood of
its labels; whether a pair changed, a logistic function of its likeliest pixels, by the data set's own flags; and the
probabilities of the unchanged pairs, which `kcfi caption --alarm_rate` reads its threshold off.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch.nn import functional as F
from tqdm import tqdm

from kcfi.files import read_json
from kcfi.models import load
from kcfi.processing import Describer, InputError
from kcfi.processing.calibration_kcfi import EVIDENCE, Calibration, evidence
from kcfi.training.data.pairs import MaskClasses, num_classes
from kcfi.training.load import load_pairs
from kcfi.training.scoring.evaluate import check_classes, true_mask

PIXELS = 4096  # of every pair, drawn at random, for the temperature
BINS = 10
RATES = (0.01, 0.05, 0.1)  # alarm rates that are reported
FILE = "processor_config.json"


@dataclass
class Sample:
    """What is kept of one pair.

    Args:
        logits: mask logits of some pixels, (classes, N).
        labels: their class ids, (N,); empty without a mask.
        surest: mask logits of the pixels that are likeliest to have changed, (classes, M).
        changed: the data set's own flag.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    surest: torch.Tensor
    changed: bool


@dataclass
class Reliability:
    """Claims against truth in `BINS` equal bins of probability.

    Args:
        count: claims per bin.
        claimed: sum of their probabilities.
        true: how many of them were true.
    """

    count: NDArray[np.float64] = field(default_factory=lambda: np.zeros(BINS))
    claimed: NDArray[np.float64] = field(default_factory=lambda: np.zeros(BINS))
    true: NDArray[np.float64] = field(default_factory=lambda: np.zeros(BINS))

    def update(self, probabilities: NDArray[Any], truth: NDArray[Any]) -> None:
        """Count claims; both arrays have one shape."""
        level = (probabilities * BINS).astype(int).clip(0, BINS - 1).ravel()
        for total, weights in ((self.count, None), (self.claimed, probabilities), (self.true, truth)):
            total += np.bincount(level, None if weights is None else weights.ravel(), BINS)

    @property
    def error(self) -> float:
        """Expected calibration error, 0 to 1 (arXiv 1706.04599, eq. 3)."""
        return float(np.abs(self.claimed - self.true).sum() / max(self.count.sum(), 1))


def read_samples(
    describer: Describer, pairs: Any, mask_classes: MaskClasses, seed: int = 0, name: str = "pairs"
) -> Iterator[Sample]:
    """Look at every pair of a data set.

    Args:
        describer: of the model.
        pairs: a data set with a length.
        mask_classes: what its masks label.
        seed: of the pixels that are drawn.
        name: for the progress bar.

    Raises:
        InputError: a pair larger than the model's tile.
    """
    generator = torch.Generator().manual_seed(seed)
    for example in tqdm(pairs, name, len(pairs), unit="pair"):
        pair = example["image_before"], example["image_after"]
        if not describer.fits(pair[0]):
            raise InputError(
                f"{example['filename']} is larger than the model's tile, {describer.tile} px: calibrate on pairs of "
                "the size that it was trained on."
            )
        [(logits, seen)] = describer.mask_logits([pair])
        mask = true_mask(example, mask_classes)
        flat, labels = logits[:, seen], torch.empty(0, dtype=torch.long)
        changes = 1 - flat.softmax(0)[0]
        surest = flat[:, changes.topk(min(5 * EVIDENCE, len(changes))).indices]  # room for another temperature
        if mask is not None:
            chosen = torch.randint(flat.shape[1], (PIXELS,), generator=generator)
            labels, flat = torch.from_numpy(mask)[seen][chosen].long(), flat[:, chosen]
        yield Sample(flat[:, : len(labels)], labels, surest, bool(example["changed"]))


def labelled_logits(logits: torch.Tensor, mask_classes: MaskClasses, temperature: float) -> torch.Tensor:
    """Log probabilities (classes of the labels, N) of what masks label; logits are (classes of the model, N).

    Masks of buildings alone say nothing of a model's roads: building against everything else; masks of change alone
    nothing of its classes: anything against nothing.
    """
    logs = (logits / temperature).log_softmax(0)
    if len(logs) == 2 or mask_classes == "road_building":
        return logs
    last = -1 if mask_classes == "building" else 1
    return torch.stack([logs[:last].logsumexp(0), logs[last:].logsumexp(0)])


def fit_temperature(samples: list[Sample], mask_classes: MaskClasses) -> float:
    """The temperature under which the labels are likeliest, 0.05 to 20; 1 without labels."""
    labelled = [sample for sample in samples if len(sample.labels)]
    if not labelled:
        return 1.0
    logits = torch.cat([sample.logits for sample in labelled], 1)
    labels = torch.cat([sample.labels for sample in labelled])

    def loss(log_temperature: float) -> float:
        return float(F.nll_loss(labelled_logits(logits, mask_classes, np.exp(log_temperature)).T, labels))

    return float(np.exp(optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def fit_pairs(evidences: NDArray[np.float64], changed: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and intercept of the log odds that a pair changed (Platt scaling, with his smoothed targets)."""
    yes, no = int(changed.sum()), int((~changed).sum())
    if not (yes and no):
        raise InputError("Calibration needs changed and unchanged pairs; this split has only one kind.")
    targets = np.where(changed, (yes + 1) / (yes + 2), 1 / (no + 2))

    def loss(parameters: NDArray[np.float64]) -> float:
        odds = parameters[0] * evidences + parameters[1]
        return float((np.logaddexp(0, odds) - targets * odds).mean())

    slope, intercept = optimize.minimize(loss, [1.0, 0.0]).x
    if slope <= 0:
        raise InputError("This model is no surer of changed pairs than of unchanged ones: nothing to calibrate.")
    return float(slope), float(intercept)


def fit(samples: list[Sample], mask_classes: MaskClasses, more_unchanged: list[Sample]) -> Calibration:
    """Fit everything.

    Args:
        samples: of changed and unchanged pairs.
        mask_classes: what their masks label.
        more_unchanged: further pairs, for the alarm rates only; those of them that changed are left out.
    """
    temperature = fit_temperature(samples, mask_classes)
    only = Calibration(temperature)

    def changes(sample: Sample) -> torch.Tensor:
        return 1 - only.class_probabilities(sample.surest[..., None])[0]

    evidences = np.array([float(evidence(changes(sample))) for sample in samples])
    slope, intercept = fit_pairs(evidences, np.array([sample.changed for sample in samples]))
    fitted = Calibration(temperature, slope, intercept)
    unchanged = [sample for sample in (*samples, *more_unchanged) if not sample.changed]
    return Calibration(temperature, slope, intercept, [fitted.pair_probability(changes(s)) for s in unchanged])


def calibrate(
    model: str,
    dataset: str,
    split: str = "val",
    unchanged_split: str | None = None,
    mask_classes: MaskClasses | None = None,
    num_pairs: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure a model on a split and save its calibration in the model's folder.

    Args:
        model: folder of the model; its `processor_config.json` is written anew.
        dataset: as for `kcfi evaluate`.
        split: pairs that the model was not trained on.
        unchanged_split: a further split whose unchanged pairs count for the alarm rates.
        mask_classes: what the masks label (None: as the model was trained); "building" where roads have no label.
        num_pairs: the first so many of each split (None: all).
        device: see `kcfi.models.load`.

    Returns:
        What was fitted, the calibration error before and after, and for each of `RATES` the threshold (None: too few
        unchanged pairs) and the share of changed pairs above it, on the pairs that it was fitted to.

    Raises:
        FileNotFoundError: no such folder.
        InputError: a model without a change detection head, or of fewer classes than the masks; pairs that cannot be
            used, or that the model does not tell apart.
    """
    file = Path(model) / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give the folder of a model; its calibration is saved in it.")
    network, processor = load(model, device)
    if network.model.change_detection_head is None:
        raise InputError("This model has no change detection head: it has no probabilities to calibrate.")
    describer = Describer(network, processor)
    classes = mask_classes or ("road_building" if network.config.num_change_classes == 3 else "change")
    if num_classes(classes) > network.config.num_change_classes:
        check_classes(network, classes)
    samples = list(read_samples(describer, load_pairs(dataset, split, num_pairs), classes, name=split))
    more = []
    if unchanged_split:
        pairs = load_pairs(dataset, unchanged_split, num_pairs)
        more = list(read_samples(describer, pairs, classes, name=unchanged_split))
    calibration = fit(samples, classes, more)

    report: dict[str, Any] = {**calibration.to_dict(), "unchanged": len(calibration.unchanged)}
    report["mask_error"] = [mask_error(samples, classes, t) for t in (1.0, calibration.temperature)]
    changed = [
        calibration.pair_probability(1 - calibration.class_probabilities(s.surest[..., None])[0])
        for s in samples
        if s.changed
    ]
    report["alarm_rates"] = {}
    for rate in RATES:
        try:
            threshold = calibration.threshold(rate)
        except InputError:
            report["alarm_rates"][rate] = None
        else:
            found = float(np.mean(np.array(changed) > threshold))
            report["alarm_rates"][rate] = {"threshold": threshold, "changed_found": found}
    settings = read_json(file) | {"calibration": calibration.to_dict()}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(file)
    return report


def mask_error(samples: list[Sample], mask_classes: MaskClasses, temperature: float) -> float | None:
    """Expected calibration error of what the masks label (everything but the background), 0 to 1; None without."""
    reliability = Reliability()
    for sample in samples:
        if len(sample.labels):
            claims = 1 - labelled_logits(sample.logits, mask_classes, temperature)[0].exp()
            reliability.update(claims.double().numpy(), (sample.labels > 0).numpy())
    return reliability.error if reliability.count.any() else None
