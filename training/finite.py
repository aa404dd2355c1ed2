"""NaN and Inf: a run ends before anything that is not finite gets into a checkpoint, with an error that names it."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from kcfi.files import name_some

SMALLEST_SCALE = 1.0  # of a loss in fp16, in which gradients overflow now and then: below, it is not the scale's doing


class StepNumbers:
    """What an optimizer step has shown so far, for the errors about it: its losses and its pairs on this rank.

    Attributes:
        step: number of the step, from 1.
        files: names of its pairs.
        losses: by task, summed over the micro-batches.
    """

    def __init__(self) -> None:
        self.start(0, ())

    def start(self, step: int, files: Sequence[str]) -> None:
        """Begin a step."""
        self.step, self.files = step, list(files)
        self.losses: dict[str, torch.Tensor] = {}

    def check_losses(self, losses: Mapping[str, torch.Tensor], total: torch.Tensor, files: Sequence[str]) -> None:
        """Look at the losses of a micro-batch, before its gradients are computed.

        Args:
            losses: by task.
            total: what is differentiated.
            files: names of the pairs of the micro-batch.

        Raises:
            FloatingPointError: names step, losses and pairs.
        """
        if not torch.isfinite(total):
            values = ", ".join(f"{task} loss {loss.item()}" for task, loss in losses.items())
            raise FloatingPointError(
                f"Optimizer step {self.step}: {values}. Pairs of the batch: {', '.join(files)}. Training stopped "
                "before the weights changed; a lower learning rate or bf16 instead of fp16 may help."
            )
        for task, loss in losses.items():
            self.losses[task] = self.losses[task] + loss.detach() if task in self.losses else loss.detach()

    def check_gradient(self, norm: float, scale: float = 0.0) -> None:
        """Look at the norm of the gradient of the whole step, before the weights change.

        Args:
            norm: over all ranks.
            scale: by which fp16 multiplies its loss; it skips a step that overflows, and halves this.

        Raises:
            FloatingPointError: names step, losses and the pairs of the step on this rank.
        """
        if not math.isfinite(norm) and scale < SMALLEST_SCALE:
            raise FloatingPointError(
                f"Optimizer step {self.step}: the losses are finite, but the norm of their gradient is {norm} "
                f"({self._about()}). Training stopped before the weights changed; a lower learning rate may help."
            )

    def check_weights(self, model: nn.Module) -> None:
        """Look at the weights behind a step, before anything is saved.

        Raises:
            FloatingPointError: names step, weights, losses and the pairs of the step on this rank.
        """
        broken = broken_weights(model)
        if broken:
            raise FloatingPointError(
                f"Optimizer step {self.step}: losses and gradient were finite, but it made weights that are not: "
                f"{name_some(broken)} ({self._about()}). The last checkpoint is as it was; look at the learning rate "
                "and at the settings of the optimizer (adam_epsilon above 0)."
            )

    def _about(self) -> str:
        values = ", ".join(f"{task} loss {value.item():.6g}" for task, value in self.losses.items())
        return f"{values}; pairs: {name_some(self.files, 20)}"


def broken_weights(model: nn.Module) -> list[str]:
    """Names of the trainable weights that are not finite; of what ZeRO-3 has split, a rank looks at its part."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    held = {name: getattr(weight, "ds_tensor", weight).detach() for name, weight in weights.items()}
    if not held or torch.isfinite(nn.utils.get_total_norm(list(held.values()))):  # one look at the device
        return []
    return [name for name, weight in held.items() if not torch.isfinite(weight).all()]
