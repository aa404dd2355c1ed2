"""KCFICollator: examples of a data set -> a batch, for training or for evaluation."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from kcfi.processing import INSTRUCTIONS, KCFIProcessor
from kcfi.training.levir_cc import MaskClasses, class_ids

IGNORED = -100  # label of the tokens that are not learned: the prompt and the padding


@dataclass
class KCFICollator:
    """Examples (see `levir_cc`) -> tensors of a batch.

    In training a pair gives `captions_per_pair` rows of prompt and caption, padded on the right. Instruction and
    captions are drawn once per pair and visit, by a function of (seed, epoch, filename): workers, ranks and resumed
    runs draw the same. In evaluation a pair gives one row, the prompt with the first instruction, padded on the left.

    Args:
        processor: of the model.
        mask_classes: classes to make of the masks.
        captions_per_pair: captions drawn per pair; a pair that has fewer gives all it has.
        train: rows for training, or prompts for evaluation.
        seed: of the draws.
    """

    processor: KCFIProcessor
    mask_classes: MaskClasses = "change"
    captions_per_pair: int = 1
    train: bool = True
    seed: int = 0
    # in shared memory: loader workers that outlive an epoch see the next one
    _epoch: torch.Tensor = field(
        default_factory=lambda: torch.zeros((), dtype=torch.int64).share_memory_(), repr=False
    )

    def __post_init__(self) -> None:
        if not 1 <= self.captions_per_pair <= 5:
            raise ValueError(f"captions_per_pair={self.captions_per_pair} must be 1 to 5.")

    def set_epoch(self, epoch: int) -> None:
        """Draw other instructions and captions from now on."""
        self._epoch.fill_(epoch)

    def for_evaluation(self) -> "KCFICollator":
        """The same settings in evaluation mode."""
        return replace(self, train=False)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            Both: `pixel_values` (R, 2, 3, H, W), `input_ids` and `attention_mask` (R, T), `labels`, `filenames`, and
            `mask_labels` (R, H, W), 255 = no label, if a pair has a mask. Training: R rows, `labels` (R, T) is -100 on
            prompt and padding. Evaluation: one row per pair, `labels` (B, T') holds the first caption alone; and
            `references`, `changed`, `sizes` (height, width) and `true_masks` (class ids at that size, or None).

        Raises:
            ValueError: a pair without captions, or a mask with unknown values; names the pair.
        """
        for example in examples:
            if not example["captions"]:
                raise ValueError(f"{example['filename']}: no captions.")
        masks = [
            None if example["mask"] is None else class_ids(example["mask"], self.mask_classes, example["filename"])
            for example in examples
        ]
        visual = self.processor.image_processor(
            images=[[example["image_before"], example["image_after"]] for example in examples],
            segmentation_maps=None if all(mask is None for mask in masks) else masks,
            return_tensors="pt",
        )
        batch: dict[str, Any] = {**visual, "filenames": [example["filename"] for example in examples]}
        return self._training_rows(examples, batch) if self.train else self._prompts(examples, batch, masks)

    def _training_rows(self, examples: Sequence[dict[str, Any]], batch: dict[str, Any]) -> dict[str, Any]:
        """Rows of prompt and caption; the tensors of a pair are repeated for each of its rows."""
        pairs, rows, labels = [], [], []
        for pair, example in enumerate(examples):
            draw = random.Random(f"{self.seed} {self._epoch.item()} {example['filename']}")
            prompt = self.processor.encode_prompt(draw.choice(INSTRUCTIONS))
            captions = example["captions"]
            for caption in draw.sample(captions, min(self.captions_per_pair, len(captions))):
                answer = self.processor.encode_caption(caption.strip())
                pairs.append(pair)
                rows.append(prompt + answer)
                labels.append([IGNORED] * len(prompt) + answer)
        for name in {"pixel_values", "mask_labels"} & batch.keys():
            batch[name] = batch[name][pairs]
        return {**batch, **self._padded(rows, "right"), "labels": _pad(labels, IGNORED, "right")}

    def _prompts(self, examples: Sequence[dict[str, Any]], batch: dict[str, Any], masks: list[Any]) -> dict[str, Any]:
        """One prompt per pair, and what its prediction is compared with."""
        prompt = self.processor.encode_prompt()
        answers = [self.processor.encode_caption(example["captions"][0].strip()) for example in examples]
        return {
            **batch,
            **self._padded([prompt] * len(examples), "left"),
            "labels": _pad(answers, IGNORED, "right"),
            "references": [example["captions"] for example in examples],
            "changed": [example["changed"] for example in examples],
            "sizes": [(example["image_after"].height, example["image_after"].width) for example in examples],
            "true_masks": masks,
        }

    def _padded(self, rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
        ones = [[1] * len(row) for row in rows]
        pad = self.processor.tokenizer.pad_token_id
        return {"input_ids": _pad(rows, pad, side), "attention_mask": _pad(ones, 0, side)}


def _pad(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
    """Rows of ids -> (R, longest), int64."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
