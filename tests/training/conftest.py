"""A tiny model, its processor and a handful of pairs, all made here: nothing is downloaded."""

import copy
import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from kcfi import KCFIForConditionalGeneration, join_towers
from kcfi.processing import INSTRUCTIONS, KCFIProcessor
from kcfi.training.arguments import KCFITrainingArguments
from kcfi.training.collator import KCFICollator
from kcfi.training.trainer import KCFITrainer

UNCHANGED = ["the scene is the same as before .", "there is no difference .", "no change has occurred ."]
CHANGED = ["a house appears in the {} .", "a building is built in the {} .", "one house has been built in the {} ."]
VISION = {
    "model_type": "vit",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


class Pairs(Dataset):
    """32 x 32 scenes; in every second one a bright square appears.

    With "some" masks or captions the first and every third pair after it has no mask, the one behind it no captions.
    """

    def __init__(self, count=8, masks="all", captions="all"):
        self.count, self.masks, self.captions = count, masks, captions

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        random = np.random.default_rng(index)
        before = random.integers(40, 90, (32, 32, 3), dtype=np.uint8)
        after, mask = before.copy(), np.zeros((32, 32), np.uint8)
        place, column = (("left", 4), ("right", 18))[index // 2 % 2]
        if index % 2:
            after[8:20, column : column + 10] = 230
            mask[8:20, column : column + 10] = 255
        labelled = self.masks == "all" or (self.masks == "some" and index % 3)
        described = self.captions == "all" or (self.captions == "some" and index % 3 != 1)
        captions = [caption.format(place) for caption in CHANGED] if index % 2 else UNCHANGED
        return {
            "image_before": Image.fromarray(before),
            "image_after": Image.fromarray(after),
            "mask": Image.fromarray(mask) if labelled else None,
            "captions": captions if described else [],
            "changed": bool(index % 2),
            "filename": f"pair_{index}.png",
            "split": "train",
        }


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = " ".join([*INSTRUCTIONS, *UNCHANGED, *CHANGED, "left right"])
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    vocabulary = ["<unk>", "<eos>", "<image>", *sorted({word for word, _ in split.pre_tokenize_str(words)})]
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", extra_special_tokens=["<image>"]
    )


@pytest.fixture
def vision() -> dict[str, int | str]:
    """Config of a tiny vision tower."""
    return dict(VISION)


@pytest.fixture(scope="session")
def make_pairs() -> type[Pairs]:
    return Pairs


@pytest.fixture(scope="session")
def launched() -> dict[str, str]:
    """Environment variables of processes that torchrun starts; taken before a test hides Java."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # DeepSpeed calls ninja
    return {**os.environ, "PATH": path, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def root(tmp_path):
    """A LEVIR-MCI folder: two training pairs and one validation pair of 8 x 6 px, grey masks."""
    entries = [
        {"filename": "a.png", "split": "train", "changeflag": 1, "imgid": 0, "filepath": "train", "sentids": [0, 1]},
        {"filename": "b.png", "split": "train", "changeflag": 0},
        {"filename": "c.png", "split": "val", "changeflag": 1},
    ]
    folder = tmp_path / "levir_mci"
    mask = np.tile(np.array([[0, 128, 255], [255, 0, 128]], np.uint8), (3, 3))[:, :8]
    for number, entry in enumerate(entries):
        sentences = [f" sentence {n} of {entry['filename']} ." for n in range(5)]
        entry["sentences"] = [{"raw": sentence, "tokens": sentence.split()} for sentence in sentences]
        for name, image in (
            ("A", Image.new("RGB", (8, 6), (10 + number,) * 3)),
            ("B", Image.new("RGB", (8, 6), (100 + number,) * 3)),
            ("label", Image.fromarray(mask)),
        ):
            path = folder / "images" / entry["split"] / name / entry["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    (folder / "LevirCCcaptions.json").write_text(json.dumps({"images": entries, "dataset": "LEVIR-CC"}))
    return folder


def save_text_model(folder: Path, **settings: float) -> Path:
    """Write a tiny language model with its tokenizer."""
    tokenizer = make_tokenizer()
    config = Olmo2Config(  # AutoTokenizer would put Qwen2's own tokenizer before a Qwen2 model
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **settings,
    )
    torch.manual_seed(0)
    Olmo2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_model(tmp_path_factory) -> Path:
    """Folder of a tiny language model with its tokenizer."""
    return save_text_model(tmp_path_factory.mktemp("text_model"))


@pytest.fixture
def hub_text_model(text_model, tmp_path, monkeypatch) -> tuple[str, str]:
    """Hub id and commit of the same language model, in the Hub's cache."""
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub"
    shutil.copytree(text_model, cache / "models--me--lm" / "snapshots" / commit)
    (cache / "models--me--lm" / "refs").mkdir()
    (cache / "models--me--lm" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return "me/lm", commit


@pytest.fixture(scope="session")
def processor() -> KCFIProcessor:
    return KCFIProcessor.from_towers(make_tokenizer(), image_size=32, patch_size=8)


@pytest.fixture
def model(text_model) -> KCFIForConditionalGeneration:
    torch.manual_seed(0)
    return join_towers(VISION, str(text_model), flow_residual="cross")[0]


@pytest.fixture
def recipe(tmp_path, text_model, vision, monkeypatch):
    monkeypatch.setenv("PATH", "")  # without Java, which takes seconds to start
    values = {
        "vision_config": vision,
        "text_model": str(text_model),
        "model_settings": {"flow_residual": "cross", "num_change_classes": 3},
        "mask_classes": "road_building",
        "dataset": "synthetic",
        "num_train_pairs": 8,
        "num_eval_pairs": 4,
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "metric_for_best_model": "mask_f1",
        "generation_max_new_tokens": 4,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def no_java(monkeypatch):
    """Scores without Java, which takes seconds to start."""
    monkeypatch.setenv("PATH", "")


def arguments(folder, **settings):
    defaults = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "vision_learning_rate": 1e-3,
        "projector_learning_rate": 1e-3,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "logging_steps": 1,
        "save_total_limit": None,
        "disable_tqdm": True,
        "report_to": ["none"],
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return KCFITrainingArguments(output_dir=str(folder), **{**defaults, **settings})


@pytest.fixture
def make_trainer(model, processor, tmp_path):
    """A trainer of a copy of the model; every call gives the same weights."""

    def make(pairs, collator=None, callbacks=None, eval_dataset=None, options=None, **settings):
        return KCFITrainer(
            copy.deepcopy(model),
            arguments(tmp_path, **settings),
            collator or KCFICollator(processor, seed=3),
            train_dataset=pairs,
            eval_dataset=eval_dataset,
            processing_class=processor,
            callbacks=callbacks,
            **(options or {}),
        )

    return make
