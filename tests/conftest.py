"""A tiny model that finds what changed, with its processor, in a folder: nothing is downloaded or trained."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: an unknown id fails at once

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2Config, TokenizersBackend

from kcfi import KCFIConfig, KCFIForConditionalGeneration
from kcfi.processing import KCFIProcessor

SIDE = 32  # px: what the model reads


def save_detector(
    folder: Path,
    threshold: float = 0.25,
    side: int = SIDE,
    shortest_edge: int | None = None,
    tile_size: int | None = None,
    **settings: object,
) -> Path:
    """Save a model whose mask is "the plain features of a patch differ by more than `threshold`".

    It reads `side` px; `shortest_edge` and `tile_size` are its processor's.

    Its towers are random, so its sentences are letters without a meaning; but they depend on the images.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokens = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = TokenizersBackend(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=special
    )
    processor = KCFIProcessor.from_towers(tokenizer, image_size=side, patch_size=8, shortest_edge=shortest_edge)
    processor.tile_size = tile_size
    vision = {"model_type": "vit", "image_size": side, "patch_size": 8, "num_hidden_layers": 2}
    widths = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = Qwen2Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=False, **widths
    )
    config = KCFIConfig(
        vision_config={**vision, **widths},
        text_config=text,
        image_token_id=processor.image_token_id,
        **{"use_key_change_perceiver": False, "num_change_classes": 3, "head_hidden_size": 1, **settings},
    )
    torch.manual_seed(0)
    model = KCFIForConditionalGeneration(config)
    for part in (model.model.projector, model.model.language_model, model.lm_head):
        for weight in part.parameters():  # larger than usual: other features, other sentences
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.5)
    letters = torch.tensor([token.isascii() and token.isalpha() for token in tokens])
    model.lm_head.weight.data[~letters] = 0
    head = model.model.change_detection_head
    if head is not None:
        with torch.no_grad():
            head.linear.weight.fill_(1 / config.change_width)
            head.classifier.weight.zero_()
            head.classifier.weight[-1] = 1
            head.classifier.bias.copy_(torch.tensor([threshold, *[-1e4] * (config.num_change_classes - 2), 0]))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def detector(tmp_path_factory):
    """Folder of a model of three classes that marks changed patches as buildings."""
    return save_detector(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="session")
def make_detector():
    return save_detector


def draw_pair(width: int, height: int, square: tuple[int, int, int, int] | None = None) -> list[Image.Image]:
    """Two equal grey textures; `square` (left, top, right, bottom in pixels) turns white in the second one."""
    before = np.random.default_rng(0).integers(60, 120, (height, width, 3), dtype=np.uint8)
    after = before.copy()
    if square is not None:
        after[square[1] : square[3], square[0] : square[2]] = 255
    return [Image.fromarray(before), Image.fromarray(after)]


@pytest.fixture
def make_pair():
    return draw_pair


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Materials of train and test: green grass, brown soil, a red roof, a tile with six labelled red houses."""
    root = tmp_path_factory.mktemp("library")
    entries = []

    def add(name, kind, split, picture, **more):
        Image.fromarray(picture).save(root / name)
        about = {"source": "made up", "licence": "CC0-1.0", "region": split, "split": split}
        entries.append({"file": name, "kind": kind, **about, **more})

    for split in ("train", "test"):
        for kind, colour in (("grass", (30, 160, 40)), ("soil", (130, 100, 60))):
            add(f"{split}_{kind}.png", kind, split, np.full((64, 64, 3), colour, np.uint8))
        add(f"{split}_roof.png", "villa roof", split, np.full((24, 30, 4), (200, 40, 30, 255), np.uint8))
        tile, labels = np.full((200, 200, 3), (60, 120, 60), np.uint8), np.zeros((200, 200), np.uint8)
        for x in (40, 90, 140):
            for y in (50, 120):
                tile[y : y + 26, x : x + 30], labels[y : y + 26, x : x + 30] = (200, 40, 30), 255
        Image.fromarray(labels).save(root / f"{split}_labels.png")
        add(f"{split}_tile.png", "tile", split, tile, label=f"{split}_labels.png")
    (root / "materials.json").write_text(
        json.dumps({"sources": [{"name": "made up", "licence": "CC0-1.0", "images": 2}], "entries": entries})
    )
    return root


@pytest.fixture
def windows(monkeypatch):
    """Renaming as on Windows: onto nothing that is there, be it a file or an empty folder."""
    rename = os.rename

    def rename_onto_nothing(source, target, **options):
        if os.path.exists(target):
            raise FileExistsError(17, "Cannot create a file when that file already exists", str(target))
        rename(source, target, **options)

    monkeypatch.setattr("os.rename", rename_onto_nothing)


@pytest.fixture
def hub_detectors(make_detector, tmp_path, monkeypatch):
    """The commits of a cached Hub id, "me/detector": of main, whose threshold is 0.25, and of v1, where it is 0.75."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commits = {"main": "a" * 40, "v1": "b" * 40}
    (references := tmp_path / "hub/models--me--detector/refs").mkdir(parents=True)
    for (name, commit), threshold in zip(commits.items(), (0.25, 0.75), strict=True):
        make_detector(references.parent / "snapshots" / commit, threshold)
        (references / name).write_text(commit)
    return commits
