"""Dynamic weight averaging (eq. 10): the task whose loss falls more slowly gets the larger weight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

TASKS = ("caption", "mask")
EPSILON = 1e-8  # keeps the ratio of two vanished losses at 1 and a vanished denominator finite


def dwa_weights(previous: Sequence[float], before_previous: Sequence[float], temperature: float) -> list[float]:
    """Task weights from two successive averaged losses per task (eq. 10, for any number K of tasks).

    Args:
        previous: L_k(t-1), one per task.
        before_previous: L_k(t-2), one per task.
        temperature: T; the larger, the more even the weights (0.2 in the paper, 2.0 in the authors' code).

    Returns:
        K weights that add up to K.
    """
    speeds = [(new + EPSILON) / (old + EPSILON) for new, old in zip(previous, before_previous, strict=True)]
    largest = max(speeds)
    powers = [math.exp((speed - largest) / temperature) for speed in speeds]
    return [len(powers) * power / sum(powers) for power in powers]


@dataclass
class DynamicWeightAverage:
    """The weights of the captioning and the mask loss over a run, from the losses of its optimizer steps.

    Feed it the losses of every optimizer step, already averaged over micro-batches and ranks, so that every rank holds
    the same state. All of the state is in `state_dict`: a run restored from it goes on exactly as it would have.

    Args:
        temperature: T of eq. 10.
        window: optimizer steps that one averaged loss covers (1 = the paper's "training step").
        sums, counts, steps: the window that is filling; a task's loss is averaged over the steps that had it.
        previous, before_previous: averaged losses of the last two full windows.
    """

    temperature: float = 0.2
    window: int = 1
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    previous: dict[str, float] = field(default_factory=dict)
    before_previous: dict[str, float] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the next optimizer step: 1 each until both tasks have two averaged losses."""
        if not all(task in self.before_previous for task in TASKS):
            return dict.fromkeys(TASKS, 1.0)
        previous = [self.previous[task] for task in TASKS]
        before_previous = [self.before_previous[task] for task in TASKS]
        return dict(zip(TASKS, dwa_weights(previous, before_previous, self.temperature), strict=True))

    def update(self, losses: Mapping[str, float]) -> None:
        """Count one optimizer step with its losses; a task without any label in the step is left out of `losses`."""
        for task, loss in losses.items():
            self.sums[task] = self.sums.get(task, 0.0) + loss
            self.counts[task] = self.counts.get(task, 0) + 1
        self.steps += 1
        if self.steps < self.window:
            return
        self.before_previous = dict(self.previous)  # a task absent from the window keeps its last averaged loss
        self.previous |= {task: self.sums[task] / self.counts[task] for task in self.sums}
        self.sums, self.counts, self.steps = {}, {}, 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-serialisable without loss."""
        return {name: value for name, value in asdict(self).items() if name not in ("temperature", "window")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; temperature and window stay those of this run."""
        for name, value in state.items():
            setattr(self, name, dict(value) if isinstance(value, Mapping) else value)
