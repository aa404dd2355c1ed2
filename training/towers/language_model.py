"""The small language model of kcfi-tiny: its tokenizer, and its pretraining on sketches of changes.

```
python -m kcfi.training.towers.language_model --output runs/tiny-lm               # what kcfi-tiny was made with
python -m kcfi.training.towers.language_model --output runs/tiny-lm --steps 20    # a trial, under a minute
```

KCFI freezes its language model, so all that a sentence needs beyond the image features must be in it beforehand. A
large model knows how to count and to locate; one of 2 M parameters has to be shown. So it learns to write synthetic
captions behind a *sketch* in place of the image features: per patch the mean of the embeddings of the words that hold
there (what changed, built or removed, row, column, ...), with noise. No pixel is drawn. The vision side of kcfi-tiny
then only has to say what it sees in these words.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    TokenizersBackend,
    Trainer,
    TrainingArguments,
)

from kcfi.pictures import MASK_ROAD
from kcfi.processing import INSTRUCTIONS, KCFIProcessor
from kcfi.training.sharing.model_card import write_tower_card
from kcfi.training.synthetic.dataset import Change, SyntheticDataset
from kcfi.training.synthetic.layout import ObjectKind

BINS = 16  # rows and columns that the words of position tell apart
KINDS = {"road": "<road>", "villa": "<villa>", "large building": "<large building>"}
GROUNDS = {"trees": "<on trees>", "bareland": "<on bareland>", "grass": "<on grass>"}
ALONG = {
    "road": "<road side>",
    "roads": "<road sides>",
    "new road": "<new road side>",
    "new roads": "<new road sides>",
}
WORDS = [
    *KINDS.values(),
    *GROUNDS.values(),
    *ALONG.values(),
    "<same>",
    "<built>",
    "<removed>",
    "<one object>",  # at the middle of each object, so that they can be counted
    "<both sides>",
    *(f"<row {i}>" for i in range(BINS)),
    *(f"<column {i}>" for i in range(BINS)),
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
WORDS_PER_PATCH = 8


def build_tokenizer(captions: list[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of captions and instructions that speaks ChatML; any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[*SPECIAL, *WORDS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["user\n", "assistant\n", "system\n"]
    tokenizer.train_from_iterator([*captions, *(list(INSTRUCTIONS) + roles) * 100], trainer)
    return TokenizersBackend(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def sketch(mask: NDArray[np.uint8], change: Change, grid: int) -> list[list[str]]:
    """The words that hold at each patch.

    Args:
        mask: (H, W), file values of the changed pixels: 0, 128 road, 255 building.
        change: the facts the captions state.
        grid: patches per side.

    Returns:
        `grid * grid` lists of words, row by row.
    """
    words: list[list[str]] = []
    for patch in range(grid * grid):
        row, column = patch // grid * BINS // grid, patch % grid * BINS // grid
        words.append([f"<row {row}>", f"<column {column}>"])
    side = mask.shape[0] / grid
    objects = {entry.kind: entry for entry in change.objects}
    changed: dict[int, list[str]] = {}
    for value in np.unique(mask[mask > 0]):
        labels = ndimage.label(mask == value)[0]
        for index, area in enumerate(ndimage.find_objects(labels), start=1):
            pixels = labels[area] == index
            kind: ObjectKind = "road" if value == MASK_ROAD else ("villa" if "villa" in objects else "large building")
            facts = [KINDS[kind], "<built>" if change.appears else "<removed>"]
            facts += [GROUNDS[change.ground]] if change.ground else []
            facts += [ALONG[objects[kind].road]] if objects[kind].road else []
            facts += ["<both sides>"] if objects[kind].both_sides else []
            ys, xs = np.nonzero(pixels)
            ys, xs = ys + area[0].start, xs + area[1].start
            patches, sizes = np.unique((ys // side).astype(int) * grid + (xs // side).astype(int), return_counts=True)
            for patch, size in zip(patches, sizes, strict=True):
                if size >= 0.25 * side * side or size == sizes.max():
                    changed[int(patch)] = facts
            middle = int(ys.mean() // side) * grid + int(xs.mean() // side)
            changed[middle] = [*facts, "<one object>"]
    for patch, place in enumerate(words):
        place += changed.get(patch, ["<same>"])
    return words


class Sketches(Dataset[dict[str, Any]]):
    """Sketches of synthetic scenes and one caption each; the images are never painted.

    Args:
        scenes: where the facts come from.
        processor: writes prompts and captions.
        grids: patches per side; each sample draws one.
    """

    def __init__(self, scenes: SyntheticDataset, processor: KCFIProcessor, grids: tuple[int, ...]) -> None:
        self.scenes, self.processor, self.grids = scenes, processor, grids
        self.ids = {word: processor.tokenizer.convert_tokens_to_ids(word) for word in WORDS}
        self.prompts = [processor.tokenizer(processor.prompt(text))["input_ids"] for text in INSTRUCTIONS]

        self.seen: dict[int, tuple[list[torch.Tensor], list[str]]] = {}  # finding the facts takes longer than a step

    def __len__(self) -> int:
        return len(self.scenes)

    def facts(self, index: int) -> tuple[list[torch.Tensor], list[str]]:
        """The sketch of a scene for each grid, (N, words) of token ids with -1 = none, and its captions."""
        if index not in self.seen:
            mask, change, captions = self.scenes.truth(index)
            sketches = []
            for grid in self.grids:
                patches = torch.full((grid * grid, WORDS_PER_PATCH), -1, dtype=torch.int16)
                for patch, words in enumerate(sketch(mask, change, grid)):
                    patches[patch, : len(words)] = torch.tensor([self.ids[word] for word in words])
                sketches.append(patches)
            self.seen[index] = sketches, captions
        return self.seen[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        sketches, captions = self.facts(index)
        prompt = self.prompts[int(torch.randint(len(self.prompts), ()))]
        caption = captions[int(torch.randint(len(captions), ()))]
        return {"sketches": sketches, "prompt": prompt, "caption": self.processor.encode_caption(caption)}


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch at one of the grids, the first twice as often: patches (B, N, words), input_ids and labels (B, T)."""
    grids = len(samples[0]["sketches"])
    grid = max(0, int(torch.randint(-1, grids, ())))
    length = max(len(sample["prompt"]) + len(sample["caption"]) for sample in samples)
    input_ids, labels = torch.zeros(len(samples), length, dtype=torch.long), torch.full((len(samples), length), -100)
    for row, sample in enumerate(samples):
        start, end = len(sample["prompt"]), len(sample["prompt"]) + len(sample["caption"])
        input_ids[row, :end] = torch.tensor([*sample["prompt"], *sample["caption"]])
        labels[row, start:end] = input_ids[row, start:end]
    patches = torch.stack([sample["sketches"][grid] for sample in samples]).long()
    return {"patches": patches, "input_ids": input_ids, "labels": labels}


class SketchReader(nn.Module):
    """A language model that reads sketches where KCFI will put its image features.

    Args:
        language_model: trained in place.
        image_token_id: id of `<image>`, which the sketch replaces.
    """

    language_model: Any

    def __init__(self, language_model: Qwen2ForCausalLM, image_token_id: int) -> None:
        super().__init__()
        self.language_model = language_model
        self.image_token_id = image_token_id

    def embed(self, patches: torch.Tensor) -> torch.Tensor:
        """Words (B, N, words), -1 = none -> features (B, N, D) as uncertain as those of a vision tower.

        Patches are blended with a neighbour in the sequence, words are dropped and noise is added, in training only.
        """
        table = self.language_model.get_input_embeddings().weight
        present = patches >= 0
        if self.training:
            present = present & (torch.rand(patches.shape, device=patches.device) > 0.1)
        share = present / present.sum(2, keepdim=True).clamp(min=1)
        bags = share.new_zeros(*patches.shape[:2], len(table)).scatter_add_(2, patches.clamp(min=0), share)
        mean = bags @ table
        if self.training:
            blend = torch.rand(*mean.shape[:2], 1) * 0.4
            mean = (1 - blend) * mean + blend * mean.roll(1, dims=1)
            mean = mean + torch.randn_like(mean) * table.detach().std() * 0.3
        return mean

    def forward(self, patches: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        """Caption loss; `patches` (B, N, words) go where the one `<image>` of each row of `input_ids` stands."""
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        features = self.embed(patches).to(embeddings.dtype)
        at = int((input_ids[0] == self.image_token_id).nonzero()[0])  # every prompt has its <image> at the same place
        inputs = torch.cat([embeddings[:, :at], features, embeddings[:, at + 1 :]], dim=1)
        return self.language_model(
            inputs_embeds=inputs, labels=F.pad(labels, (features.shape[1] - 1, 0), value=-100), use_cache=False
        )


def main(argv: list[str] | None = None) -> None:
    """Build tokenizer and model, pretrain, save a folder that `text_model` of a recipe takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of 32 sketches (0: random weights)")
    parser.add_argument("--scenes", type=int, default=16000, help="synthetic scenes to sketch")
    parser.add_argument("--grids", type=int, nargs="+", default=[8, 16], help="patches per side of the sketches")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and weights")
    arguments = parser.parse_args(argv)

    scenes = SyntheticDataset(min(arguments.scenes, 32 * arguments.steps or 2000), seed=arguments.seed)
    captions = [caption for index in range(2000) for caption in scenes.truth(index % len(scenes))[2]]
    tokenizer = build_tokenizer(captions)
    processor: Any = KCFIProcessor.from_towers(tokenizer)
    torch.manual_seed(arguments.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    trainer = Trainer(
        model=SketchReader(model, processor.image_token_id),
        args=TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=50,
            remove_unused_columns=False,
            seed=arguments.seed,
            dataloader_num_workers=1,
            dataloader_persistent_workers=True,
        ),
        train_dataset=Sketches(scenes, processor, tuple(arguments.grids)),
        data_collator=collate,
    )
    if arguments.steps:
        trainer.train()
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    write_tower_card(arguments.output, "python -m kcfi.training.towers.language_model")


if __name__ == "__main__":
    main()
