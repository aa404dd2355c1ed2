"""KCFICollator: examples of a data set -> a batch, for training or for evaluation."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.utils.rnn import pad_sequence

from kcfi.processing import INSTRUCTIONS, InputError, KCFIProcessor
from kcfi.training.data.augmentation import augment
from kcfi.training.data.pairs import MaskClasses, class_ids

IGNORED = -100  # label of the tokens that are not learned: the prompt and the padding
PADDING = -1  # segment id of padding


@dataclass
class KCFICollator:
    """Examples (see `data/pairs.py`) -> tensors of a batch.

    In training a pair gives one row, a prompt and `captions_per_pair` captions behind it, padded on the right.
    Instruction, captions and augmentation are drawn once per pair and visit, by a function of (seed, epoch, filename):
    workers, ranks and resumed runs draw the same. In evaluation a pair gives one row, the prompt with the first
    instruction, padded on the left.

    **Several captions in a row** do not see each other. The row is [prompt without its last token] [last token of the
    prompt, caption 1] [last token, caption 2] ...; each bracket behind the first is a segment that attends to the
    prompt and to itself (`packed_attention_mask`), and its positions go on where the prompt's end. So the loss and its
    gradients are those of one row per caption, without encoding pair and prompt again for each (`packed_rows`).

    **Captions that the model draws** (`scst.py`) are not known here: with `sampled` a training batch has `prompts`,
    lists of token ids, and `references`, all captions of every pair, in place of rows.

    **A pair without captions** is a row of its prompt, without a label: its mask alone trains.

    Args:
        processor: of the model.
        mask_classes: classes to make of the masks.
        captions_per_pair: captions drawn per pair; a pair that has fewer gives all it has.
        train: rows for training, or prompts for evaluation.
        seed: of the draws.
        augment: mirror pairs and jitter their colours in training, see `augmentation.py`.
        sampled: in training the captions are drawn by the model, see above.
    """

    processor: KCFIProcessor
    mask_classes: MaskClasses = "change"
    captions_per_pair: int = 5
    train: bool = True
    seed: int = 0
    augment: bool = False
    sampled: bool = False
    # in shared memory: loader workers that outlive an epoch see the next one
    _epoch: torch.Tensor = field(
        default_factory=lambda: torch.zeros((), dtype=torch.int64).share_memory_(), repr=False
    )

    def __post_init__(self) -> None:
        if not 1 <= self.captions_per_pair <= 5:
            raise InputError(f"captions_per_pair={self.captions_per_pair} must be 1 to 5.")

    def set_epoch(self, epoch: int) -> None:
        """Draw other instructions and captions from now on."""
        self._epoch.fill_(epoch)

    def for_evaluation(self) -> "KCFICollator":
        """The same settings in evaluation mode."""
        return replace(self, train=False)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            Both: `pixel_values` (B, 2, 3, H, W), `input_ids` (B, T), `labels`, `filenames`, `sizes` (height, width),
            `mask_labels` (B, H, W), 255 = no label, if a pair has a mask, and `unreadable`, the errors of
            `ReadablePairs`, if there are any.
            Training: `labels` (B, T), -100 on prompt and padding; `segment_ids` (B, T), 0 on the prompt, k on caption
            k, -1 on padding, which `packed_attention_mask` turns into the model's `attention_mask` (`KCFITrainer`
            does); `position_ids` (B, T). Evaluation: `attention_mask` (B, T); `labels` (B, T') holds the first caption
            alone, if there is one; and `references`, `changed` and `true_masks` (class ids at these sizes, or None).

        Raises:
            InputError: a pair with neither captions nor a mask, or a mask with unknown values; names the pair.
        """
        for example in examples:
            if not example["captions"] and example["mask"] is None:
                raise InputError(f"{example['filename']}: neither captions nor a mask.")
        if self.train and self.augment:
            examples = [augment(example, self._chance(example, "augment ")) for example in examples]
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
        batch["sizes"] = [(example["image_after"].height, example["image_after"].width) for example in examples]
        unreadable = [example["unreadable"] for example in examples if "unreadable" in example]
        if unreadable:
            batch["unreadable"] = unreadable
        return self._training_rows(examples, batch) if self.train else self._prompts(examples, batch, masks)

    def _chance(self, example: dict[str, Any], purpose: str = "") -> random.Random:
        """What a pair draws from at this visit; streamed pairs bring the number of their pass along."""
        return random.Random(f"{purpose}{self.seed} {example.get('epoch', self._epoch.item())} {example['filename']}")

    def _training_rows(self, examples: Sequence[dict[str, Any]], batch: dict[str, Any]) -> dict[str, Any]:
        """A row per pair, its prompt and the captions drawn for this visit; or what `sampled` asks for."""
        prompts, answers = [], []
        for example in examples:
            draw = self._chance(example)
            prompts.append(self.processor.encode_prompt(draw.choice(INSTRUCTIONS)))
            captions = example["captions"]
            chosen = draw.sample(captions, min(self.captions_per_pair, len(captions)))
            answers.append([self.processor.encode_caption(caption.strip()) for caption in chosen])
        if self.sampled:
            return {**batch, "prompts": prompts, "references": [example["captions"] for example in examples]}
        return {**batch, **packed_rows(prompts, answers, self.processor.tokenizer.pad_token_id)}

    def _prompts(self, examples: Sequence[dict[str, Any]], batch: dict[str, Any], masks: list[Any]) -> dict[str, Any]:
        """One prompt per pair, and what its prediction is compared with."""
        prompt, encode_caption = self.processor.encode_prompt(), self.processor.encode_caption
        firsts = [example["captions"][:1] for example in examples]
        answers = [[token for caption in first for token in encode_caption(caption.strip())] for first in firsts]
        return {
            **batch,
            **self._padded([prompt] * len(examples), "left"),
            "labels": pad_rows(answers, IGNORED, "right"),
            "references": [example["captions"] for example in examples],
            "changed": [example["changed"] for example in examples],
            "true_masks": masks,
        }

    def _padded(self, rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
        ones = [[1] * len(row) for row in rows]
        pad = self.processor.tokenizer.pad_token_id
        return {"input_ids": pad_rows(rows, pad, side), "attention_mask": pad_rows(ones, 0, side)}


def packed_rows(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]], padding: int
) -> dict[str, torch.Tensor]:
    """Prompts, each with its captions in segments behind it, as the rows that `KCFICollator` describes.

    Args:
        prompts: token ids of B prompts.
        answers: for each the token ids of its captions, with their end tokens; maybe none.
        padding: token id.

    Returns:
        `input_ids`, `segment_ids`, `position_ids` and `labels`, (B, T) each.
    """
    rows, segments, positions, labels = [], [], [], []
    for prompt, captions in zip(prompts, answers, strict=True):
        *row, last = prompt
        start = len(row)
        segment, position, label = [0] * start, list(range(start)), [IGNORED] * start
        for number, answer in enumerate(captions, start=1):
            row += [last, *answer]
            segment += [number] * (1 + len(answer))
            position += range(start, start + 1 + len(answer))
            label += [IGNORED, *answer]
        rows.append(row)
        segments.append(segment)
        positions.append(position)
        labels.append(label)
    return {
        "input_ids": pad_rows(rows, padding, "right"),
        "segment_ids": pad_rows(segments, PADDING, "right"),
        "position_ids": pad_rows(positions, 0, "right"),
        "labels": pad_rows(labels, IGNORED, "right"),
    }


def packed_attention_mask(segment_ids: torch.Tensor, implementation: str, dtype: torch.dtype) -> Any:
    """What the language model's attention takes for rows of several captions.

    A token sees the tokens before it that belong to the prompt or to its own caption; padding sees itself.

    Args:
        segment_ids: (B, T), 0 on the prompt, k on caption k, -1 on padding.
        implementation: of attention: "eager", "sdpa" or "flex_attention".
        dtype: of the language model.

    Returns:
        One caption per row: the ordinary mask (B, T), for every implementation. Otherwise an additive mask
        (B, 1, T, T) or, for flex attention, a `BlockMask`.

    Raises:
        InputError: an implementation (flash attention) that takes no such mask.
    """
    if segment_ids.max() <= 1:
        return (segment_ids != PADDING).long()

    def visible(row: Any, _head: Any, query: Any, key: Any) -> torch.Tensor:
        own, other = segment_ids[row, query], segment_ids[row, key]
        return ((key <= query) & ((other == 0) | (other == own)) & (own != PADDING)) | (key == query)

    rows, length = segment_ids.shape
    if implementation == "flex_attention":
        return create_block_mask(visible, rows, None, length, length, device=segment_ids.device)
    if implementation not in ("eager", "sdpa"):
        raise InputError(
            f"{implementation} cannot keep the captions of a row apart: load the model with "
            'attn_implementation="sdpa", or set captions_per_pair to 1.'
        )
    place = torch.arange(length, device=segment_ids.device)
    batch = torch.arange(rows, device=segment_ids.device)[:, None, None, None]
    allowed = visible(batch, None, place[:, None], place)  # (B,1,T,T)
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def training_inputs(batch: Mapping[str, Any], language_model: Any) -> dict[str, Any]:
    """A training batch of `KCFICollator` -> arguments of the model.

    Logits are asked for from the first learned token on: before it stand hundreds of others, times the vocabulary.

    Args:
        batch: with `segment_ids` and `labels` (B, T).
        language_model: whose attention the mask is made for.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("filenames", "segment_ids")}
    inputs["attention_mask"] = packed_attention_mask(
        batch["segment_ids"], language_model.config._attn_implementation, language_model.dtype
    )
    learned = (batch["labels"] != IGNORED).any(dim=0).nonzero().flatten().tolist()
    length = batch["labels"].shape[1]
    first = learned[0] if learned else length - 1  # without captions one is scored: all ranks need the same gradients
    inputs["logits_to_keep"] = length - first + 1
    for name in ("labels", "advantages"):
        if name in batch:
            inputs[name] = batch[name][:, -inputs["logits_to_keep"] :]
    return inputs


def check_packing(language_model: Any, longest: int) -> None:
    """Refuse a language model that would mix up the captions of a row.

    Args:
        language_model: without its output layer; on the CPU or a GPU.
        longest: tokens of the longest row.

    Raises:
        InputError: its attention takes no such mask (flash), looks back by a window or by distance in the row, or its
            state runs on from one caption into the next (recurrent and convolutional layers).
    """
    config = language_model.config
    segments = torch.tensor([[0] * 4 + [1] * 3 + [2] * 3], device=language_model.device)
    mask = packed_attention_mask(segments, config._attn_implementation, language_model.dtype)
    tokens = torch.arange(10, device=language_model.device)[None] % config.vocab_size
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6]], device=language_model.device)
    alone = [0, 1, 2, 3, 7, 8, 9]  # the prompt and caption 2
    try:
        with torch.no_grad():
            packed = language_model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
            plain = language_model(input_ids=tokens[:, alone], use_cache=False)
        packed, plain = packed.last_hidden_state[:, 7:].float(), plain.last_hidden_state[:, 4:].float()
        tolerance = torch.finfo(language_model.dtype).eps ** 0.5
        same = bool((packed - plain).abs().max() <= tolerance * plain.abs().max())
    except (RuntimeError, ValueError, IndexError):
        same = False
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    if not same or (window and window < longest):
        raise InputError(
            f"The language model ({config.model_type}) cannot keep several captions of a row apart: set "
            "captions_per_pair to 1."
        )


def pad_rows(rows: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:
    """Rows of ids -> (R, longest), int64."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
