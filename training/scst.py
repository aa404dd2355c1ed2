"""Self-critical sequence training (arXiv 1612.00563), the second stage of a training: `objective: scst`.

Cross-entropy asks for the words of the data set, one after the other; what counts is the whole sentence. So the model
writes sentences itself: a greedy one, and `captions_per_pair` that are drawn from its probabilities. Every drawn one
gets an *advantage*, its CIDEr-D above that of the greedy one, by which its tokens become likelier or less likely:

    loss = - sum over captions and their tokens of advantage * log p(token) / number of tokens of the step

The drawn captions stand in the rows where those of the data set stand in the first stage (`collator.packed_rows`), the
mask loss is added as it is there. Who asks for CIDEr-D gets CIDEr-D: what the sentences then claim has to be counted
(benchmarks/real_levir.py).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from kcfi.modeling_kcfi import KCFIForConditionalGeneration
from kcfi.processing import InputError, KCFIProcessor
from kcfi.training.collator import IGNORED, packed_rows, pad_rows
from kcfi.training.scoring.cider import CiderD
from kcfi.training.scoring.metrics import plain_tokens

END = "<end>"  # a word behind every caption that ends: without it CIDEr-D does not miss the end of "a house on the"


def policy_loss(
    logits: torch.Tensor, labels: torch.Tensor, advantages: torch.Tensor, num_items: torch.Tensor | int
) -> torch.Tensor:
    """The loss of the module's docstring, for a micro-batch.

    Args:
        logits: (B, T, vocabulary), each position's scores of the next token.
        labels: (B, T) tokens that were drawn, -100 where there is none.
        advantages: (B, T) of the caption that a token belongs to.
        num_items: tokens of the optimizer step.
    """
    scores, drawn = logits[:, :-1].float().transpose(1, 2), labels[:, 1:]
    losses = F.cross_entropy(scores, drawn, ignore_index=IGNORED, reduction="none")  # (B,T-1)
    return (losses * advantages[:, 1:]).sum() / num_items


class GumbelNoise(LogitsProcessor):
    """Turns greedy decoding into drawing: the largest of logits with Gumbel noise is a draw from their softmax.

    Every row has a source of noise of its own: what it draws depends neither on the rows beside it nor on the device.

    Args:
        seeds: a seed per row; None = no noise, the row is decoded greedily.
        forbidden: id of a token that no row may draw.
    """

    def __init__(self, seeds: Sequence[int | None], forbidden: int) -> None:
        self.sources = [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]
        self.forbidden = forbidden

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) with noise."""
        noise = torch.zeros(scores.shape)
        for row, source in zip(noise, self.sources, strict=True):
            if source is not None:
                row.exponential_(generator=source).log_().neg_()
        scores = scores.float() + noise.to(scores.device)
        scores[:, self.forbidden] = -torch.inf
        return scores


@torch.no_grad()
def roll_out(
    model: KCFIForConditionalGeneration,
    processor: KCFIProcessor,
    pixel_values: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int | None]],
    max_new_tokens: int,
) -> list[list[list[int]]]:
    """Let the model write several captions of every pair; images and prompts are encoded once for all of them.

    Args:
        model: in evaluation mode.
        processor: its processor.
        pixel_values: (B, 2, 3, H, W).
        prompts: token ids of B prompts.
        seeds: for each pair those of its captions, the same number everywhere; see `GumbelNoise`.
        max_new_tokens: longest caption.

    Returns:
        For each pair its captions as token ids, up to and with the end token if they came to it.
    """
    features = model.get_image_features(pixel_values=pixel_values, return_dict=True)
    device, count = pixel_values.device, len(seeds[0])
    tokens = pad_rows(prompts, processor.tokenizer.pad_token_id, "left").to(device)
    seen = pad_rows([[1] * len(prompt) for prompt in prompts], 0, "left").to(device)
    encoded: Any = model.model(
        input_ids=tokens[:, :-1],
        attention_mask=seen[:, :-1],
        position_ids=(seen.cumsum(dim=1) - 1).clamp(min=0)[:, :-1],
        mm_encoder_outputs={"image": features},
        use_cache=True,
    )
    encoded.cache.batch_repeat_interleave(count)
    ends = processor.generation_tokens
    noise = GumbelNoise([seed for row in seeds for seed in row], model.config.image_token_id)
    written: Any = model.generate(  # greedy, whatever the settings saved with the model
        input_ids=tokens.repeat_interleave(count, dim=0),
        attention_mask=seen.repeat_interleave(count, dim=0),
        cache=encoded.cache,
        logits_processor=LogitsProcessorList([noise]),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        **ends,
    )
    rows = [until_end(row, ends["eos_token_id"]) for row in written[:, tokens.shape[1] :].tolist()]
    return [rows[first : first + count] for first in range(0, len(rows), count)]


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """A row up to and with its first end token: behind it there is padding."""
    length = next((place for place, token in enumerate(tokens, start=1) if token in ends), len(tokens))
    return list(tokens[:length])


class SelfCritic:
    """Puts captions that the model draws into a training batch, with their advantages.

    Args:
        model: that trains.
        processor: its processor.
        captions: of every training pair, from which the document frequencies of CIDEr-D are counted.
        samples: captions to draw per pair.
        max_new_tokens: longest of them.
        seed: what is drawn is a function of (seed, optimizer step, file name).

    Raises:
        InputError: no pair has a caption.
    """

    def __init__(
        self,
        model: KCFIForConditionalGeneration,
        processor: KCFIProcessor,
        captions: Sequence[Sequence[str]],
        samples: int,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.model, self.processor = model, processor
        self.samples, self.max_new_tokens, self.seed = samples, max_new_tokens, seed
        if not any(captions):
            raise InputError("objective=scst: no training pair has a sentence to score captions by.")
        self.cider = CiderD([[_ended(caption) for caption in references] for references in captions if references])
        # since the last line of the log: scores of the drawn captions and of the greedy ones, and their numbers
        self._sums = torch.zeros(4)
        self._new = torch.zeros(4)  # the same of this rank, since the last `finish`

    def write(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """Draw captions for a batch.

        Args:
            batch: of `KCFICollator` with `sampled`, on the model's device.
            step: optimizer steps so far.

        Returns:
            The batch of a first stage, and `advantages` (B, T), which go with its labels. A pair without references is
            a row of its prompt.
        """
        seeds = [[None, *self._seeds(name, step)] for name in batch["filenames"]]
        prompts, references = batch["prompts"], batch["references"]
        training = self.model.training
        self.model.eval()
        written = roll_out(self.model, self.processor, batch["pixel_values"], prompts, seeds, self.max_new_tokens)
        self.model.train(training)
        advantages = torch.zeros(len(written), 1 + self.samples)  # of every segment; segment 0 is the prompt
        for row, captions, true in zip(advantages, written, references, strict=True):
            if true:
                greedy, *rewards = [self.reward(caption, true) for caption in captions]
                row[1:] = torch.tensor(rewards) - greedy
                self._new += torch.tensor([sum(rewards), greedy, len(rewards), 1])
        drawn = [captions[1:] if true else [] for captions, true in zip(written, references, strict=True)]
        rows = packed_rows(prompts, drawn, self.processor.tokenizer.pad_token_id)
        rows["advantages"] = advantages.gather(1, rows["segment_ids"].clamp(min=0))
        kept = {name: value for name, value in batch.items() if name not in ("prompts", "references")}
        return {**kept, **{name: row.to(batch["pixel_values"].device) for name, row in rows.items()}}

    def reward(self, tokens: Sequence[int], references: Sequence[str]) -> float:
        """CIDEr-D of a caption, 0 to 10, with a word for its end if it came to one.

        Args:
            tokens: of `roll_out`.
            references: captions of the data set, at least one.
        """
        [text] = self.processor.post_process_image_text_to_text([list(tokens)])
        ended = tokens[-1] in self.processor.generation_tokens["eos_token_id"]
        caption = _ended(text) if ended else plain_tokens(text)
        return self.cider(caption, [_ended(reference) for reference in references])

    def _seeds(self, filename: str, step: int) -> list[int]:
        source = random.Random(f"{self.seed} {step} {filename}")
        return [source.getrandbits(63) for _ in range(self.samples)]

    def finish(self, add_up: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        """End an optimizer step: `add_up` sums a tensor over all ranks."""
        self._sums += add_up(self._new.to(device, copy=True)).cpu()
        self._new.zero_()

    def logs(self) -> dict[str, float]:
        """CIDEr-D x 100 since the last call: mean of the drawn captions, and of the greedy ones."""
        drawn, greedy, captions, pairs = self._sums.tolist()
        self._sums.zero_()
        return {"reward": 100 * drawn / captions, "greedy_reward": 100 * greedy / pairs} if captions else {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rewards": self._sums.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._sums = torch.tensor(state.get("rewards", [0.0] * 4))  # none behind a first stage


def _ended(caption: str) -> str:
    return f"{plain_tokens(caption)} {END}"
