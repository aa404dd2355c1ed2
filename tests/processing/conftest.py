import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import kcfi  # noqa: F401  # registers the Auto classes and the pipeline
from kcfi.processing import INSTRUCTIONS

SPECIAL_TOKENS = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],  # as Qwen2 and SmolLM2
    "plain": ["<s>", "</s>"],  # as base models: an end token, no padding token
    "with_image_token": ["<pad>", "</s>", "<image>"],
    "with_spare_token": ["</s>", "<unused1>", "<unused0>"],
}


def build_tokenizer(dialect, **settings):
    """A small byte-level BPE tokenizer; `dialect` is a key of SPECIAL_TOKENS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS[dialect],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*INSTRUCTIONS, "a house appears next to the road ."], trainer)
    end = "<|im_end|>" if dialect == "chatml" else "</s>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": end, **settings})


@pytest.fixture
def make_tokenizer():
    return build_tokenizer


def draw_image(seed, height=40, width=50):
    """Smooth random colours, so that resizing filters hardly differ."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def make_image():
    return draw_image


@pytest.fixture
def pair():
    return [draw_image(0), draw_image(1)]
