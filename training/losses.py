"""The two losses of a training: their balance within an optimizer step, what is logged of them, and in evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from kcfi.modeling_kcfi import KCFIForConditionalGeneration
from kcfi.processing import NO_LABEL
from kcfi.training.collator import IGNORED
from kcfi.training.dwa import TASKS, DynamicWeightAverage


class LossBalance:
    """The two losses of an optimizer step, their weights, and what is logged of them.

    A step calls `start` once, `share` and `weigh` for every micro-batch, and `finish` behind the last one.

    Args:
        dwa: moves the weights after every step (None: both stay 1).

    Attributes:
        labels: caption tokens and labelled pixels of the step, all micro-batches and ranks: what the losses are
            divided by.
        weights: of this step.
    """

    def __init__(self, dwa: DynamicWeightAverage | None = None) -> None:
        self.dwa = dwa
        self.labels = dict.fromkeys(TASKS, 0)
        self.weights = dict.fromkeys(TASKS, 1.0)
        self._sums: dict[str, Any] = dict.fromkeys(TASKS, 0.0)  # of this rank's micro-batches
        self._logged: dict[str, list[float]] = {task: [] for task in TASKS}  # of the steps since the last line
        self._logged_weights = self.weights

    def start(self, tokens: int, pixels: int) -> None:
        """Begin a step with the counts of its labels over all micro-batches and ranks."""
        self.labels = {"caption": tokens, "mask": pixels}

    def share(self, outputs: Any, mask_labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What a micro-batch adds to the losses of its step; the losses of a step are the sums of its shares.

        Args:
            outputs: of the model, whose caption loss is divided by the tokens of the step already.
            mask_labels: (B, H, W) of the micro-batch.
        """
        losses = {"caption": outputs.caption_loss}
        if outputs.mask_loss is not None and mask_labels is not None:
            losses["mask"] = outputs.mask_loss * (mask_labels != NO_LABEL).sum() / max(self.labels["mask"], 1)
        return losses

    def weigh(self, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum of a micro-batch's shares, which count from now on."""
        for task, loss in losses.items():
            self._sums[task] += loss.detach()
        total: Any = sum(self.weights[task] * loss for task, loss in losses.items())
        return total

    def finish(self, add_up: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> list[str]:
        """End a step: note its losses, and move the dynamic weight average on.

        Args:
            add_up: sums a tensor over all ranks.
            device: of that tensor.

        Returns:
            The tasks for which the step had no label.
        """
        sums = torch.tensor([float(self._sums[task]) for task in TASKS], device=device)
        losses = dict(zip(TASKS, add_up(sums).tolist(), strict=True))
        losses = {task: loss for task, loss in losses.items() if self.labels[task]}
        for task, loss in losses.items():
            self._logged[task].append(loss)
        self._sums = dict.fromkeys(TASKS, 0.0)
        self._logged_weights = self.weights
        if self.dwa is not None:
            self.dwa.update(losses)
            self.weights = self.dwa.weights
        return [task for task in TASKS if task not in losses]

    def logs(self) -> dict[str, float]:
        """Both losses, averaged over the steps since the last call, and the weights of the last of these steps."""
        found = {}
        for task, losses in self._logged.items():
            if losses:
                found[f"{task}_loss"] = sum(losses) / len(losses)
                found[f"{task}_weight"] = self._logged_weights[task]
            losses.clear()
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        state: dict[str, Any] = {"logged": self._logged}
        return state if self.dwa is None else {**state, "dwa": self.dwa.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._logged = {task: list(losses) for task, losses in state["logged"].items()}
        if self.dwa is not None and "dwa" in state:
            self.dwa.load_state_dict(state["dwa"])
            self.weights = self.dwa.weights


def evaluation_losses(model: KCFIForConditionalGeneration, batch: dict[str, Any], features: Any) -> torch.Tensor:
    """Losses of a batch in evaluation, per pair and on its first caption.

    Args:
        model: in evaluation mode.
        batch: of `KCFICollator` in evaluation mode.
        features: what `get_image_features` returned for it.

    Returns:
        (B, 4): sum of the caption loss, its tokens (0 for a pair without captions), sum of the mask loss, its pixels.
    """
    answers = batch["labels"]  # (B,T')
    attention_mask = torch.cat([batch["attention_mask"], (answers != IGNORED).long()], dim=1)
    logits = model(
        input_ids=torch.cat([batch["input_ids"], answers.clamp(min=0)], dim=1),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),  # prompts are padded on the left
        mm_encoder_outputs={"image": features},
        logits_to_keep=answers.shape[1] + 1,
        use_cache=False,
    ).logits[:, :-1]  # (B,T',vocabulary)
    losses = F.cross_entropy(logits.float().transpose(1, 2), answers, ignore_index=IGNORED, reduction="none")
    columns = [losses.sum(dim=1), (answers != IGNORED).sum(dim=1)]
    if features.mask_logits is not None and "mask_labels" in batch:
        masks = batch["mask_labels"]
        losses = F.cross_entropy(features.mask_logits.float(), masks, ignore_index=NO_LABEL, reduction="none")
        columns += [losses.sum(dim=(1, 2)), (masks != NO_LABEL).sum(dim=(1, 2))]
    else:
        columns += [torch.zeros_like(columns[0])] * 2
    return torch.stack([column.float() for column in columns], dim=1)
