"""An exponential moving average of the weights that train: `ema_decay`.

The weights of single steps wander around what they learn, the more the fewer pairs there are; their average does not.
It is what evaluation sees, what chooses the best checkpoint and what a run ends with. The weights that train go on as
if it were not there: checkpoints hold both, these to resume from and the average beside them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kcfi.processing import InputError

AVERAGE_FILE = "average.safetensors"  # in a checkpoint
START = 10  # steps: before, the average would mostly be of weights that have learned nothing


class WeightAverage:
    """The average of a model's trainable weights over the optimizer steps.

    Behind step n an average of decay d is d' times itself and 1 - d' times the weights, where d' is the smaller one of
    d and (1 + n) / (START + n).

    Args:
        model: whose weights train.
        decay: 0 to 1; 0.99 averages over about the last hundred steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.weights = {name: weight.detach().clone() for name, weight in self.trained.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take the weights behind an optimizer step into the average.

        Args:
            steps: optimizer steps before this one.
        """
        share = 1 - min(self.decay, (1 + steps) / (START + steps))
        for name, weight in self.trained.items():
            self.weights[name].lerp_(weight, share)

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the average into the model, and its weights where the average was; a second time undoes it."""
        for name, weight in self.trained.items():
            kept = weight.clone()
            weight.copy_(self.weights[name])
            self.weights[name].copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the average."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def save(self, folder: str | Path) -> None:
        """Write the average into a checkpoint."""
        save_file({name: weight.contiguous() for name, weight in self.weights.items()}, Path(folder) / AVERAGE_FILE)

    def load(self, folder: str | Path) -> None:
        """Read the average of a checkpoint.

        Raises:
            InputError: it was written without one.
        """
        file = Path(folder) / AVERAGE_FILE
        if not file.exists():
            raise InputError(f"{file} is missing: the run began without ema_decay. Resume it without, or start anew.")
        for name, weight in load_file(file).items():
            self.weights[name].copy_(weight)
