"""Probabilities that mean what they say: what `kcfi calibrate` measures on pairs with known truth, and their use.

A mask logit divided by the right temperature is right as often as it claims (arXiv 1706.04599). Whether a *pair*
changed is another question, which a few sure pixels decide: its answer is a logistic function of the likeliest pixels.
And how often unchanged pairs are called changed cannot be read off probabilities at all; it is counted on such pairs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import torch

from .reading_kcfi import InputError

EVIDENCE = 100  # px: the likeliest so many decide whether a pair changed (25 m2 at 0.5 m/px, as the smallest region)


@dataclass(frozen=True)
class Calibration:
    """What turns the scores of one model into probabilities.

    Args:
        temperature: by which mask logits are divided; above 1 for a model that is too sure.
        slope: of the log odds that a pair changed over its `evidence`.
        intercept: of the same.
        unchanged: `pair_probability` of unchanged pairs that the model was not trained on, in any order.

    Raises:
        InputError: a temperature or slope that is not above 0.
    """

    temperature: float = 1.0
    slope: float = 1.0
    intercept: float = 0.0
    unchanged: Sequence[float] = ()

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.slope > 0):
            raise InputError(
                f"A calibration of temperature {self.temperature} and slope {self.slope} turns probabilities around: "
                "both must be above 0."
            )

    def class_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask logits (..., classes, H, W) -> probabilities of the same shape."""
        return (logits / self.temperature).softmax(-3)

    def pair_probability(self, changes: torch.Tensor) -> float:
        """Probability that a pair changed.

        Args:
            changes: probability of change of every pixel that the model saw, of any shape.
        """
        return float(torch.sigmoid(self.slope * evidence(changes) + self.intercept))

    def threshold(self, alarm_rate: float) -> float:
        """The probability above which a pair counts as changed, so that few unchanged ones do.

        Of exchangeable unchanged pairs, at most the share `alarm_rate` lies above the k-th smallest of n measured
        ones, k = ceil((n + 1) (1 - alarm_rate)) (split conformal prediction, arXiv 2107.07511, section 1.1).

        Raises:
            InputError: a rate that is no share, or one for which too few unchanged pairs were measured.
        """
        count = len(self.unchanged)
        if not 0 < alarm_rate < 1:
            raise InputError(f"alarm_rate={alarm_rate}: give a share of the unchanged pairs, as 0.01.")
        rank = ceil((count + 1) * (1 - alarm_rate) - 1e-9)
        if rank > count:
            known = f"only for rates from {1 / (count + 1):.3g}" if count else "for none"
            raise InputError(
                f"alarm_rate={alarm_rate}: this model knows thresholds {known}, having seen {count} unchanged pairs. "
                "`kcfi calibrate` measures them on yours."
            )
        return sorted(self.unchanged)[rank - 1]

    def to_dict(self) -> dict[str, Any]:
        """As the processor saves it."""
        return asdict(self) | {"unchanged": list(self.unchanged)}  # whole: a rounded threshold lets its own pair pass


def evidence(changes: torch.Tensor) -> torch.Tensor:
    """Log odds of the mean of the `EVIDENCE` largest of some probabilities of change, ()."""
    largest = changes.flatten().float().topk(min(EVIDENCE, changes.numel())).values
    return torch.logit(largest.mean(), eps=1e-6)
