"""Joining a ViT of any family and a language model of any family, in folders as the Hub holds them."""

import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    SiglipImageProcessor,
    TokenizersBackend,
    ViTImageProcessor,
)

import kcfi
from kcfi import KCFIConfig, KCFIForConditionalGeneration, embedded_model, join_towers

TOWERS = Path(os.environ.get("KCFI_TOWERS", "no folder of real towers"))  # with dinov2-small, smollm2-135m-instruct
SIDE = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {"intermediate_size": 64, **SIDE}
HALVES = {
    "text_config": {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "vision_config": MLP,
}
VISION = {  # settings of the model, and the image processor beside it
    "vit": (MLP, ViTImageProcessor),
    "dinov2": ({"mlp_ratio": 2, **SIDE}, BitImageProcessor),
    "clip": (HALVES, CLIPImageProcessor),
    "siglip": (HALVES, SiglipImageProcessor),
}
META = {"format": "pt"}
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Model type, special tokens, end token, padding token, and rows of the embeddings behind the last token.
# Then the `<image>` token that is expected, and the rows that the embeddings gain for it.
TEXT = {
    "qwen2": ("qwen2", CHATML, "<|im_end|>", "<|endoftext|>", 5, "<image>", 0),
    "qwen2.5": ("qwen2", [*CHATML, "<|image_pad|>"], "<|im_end|>", "<|endoftext|>", 5, "<|image_pad|>", 0),
    "qwen3": ("qwen3", [*CHATML, "<|image_pad|>"], "<|im_end|>", "<|endoftext|>", 5, "<|image_pad|>", 0),
    "smollm2": ("llama", CHATML, "<|im_end|>", "<|im_end|>", 0, "<image>", 1),
    "llama base": ("llama", ["<s>", "</s>"], "</s>", None, 0, "<image>", 1),
    "llama 3": (
        "llama",
        ["<|begin_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>"],
        "<|eot_id|>",
        None,
        0,
        "<|reserved_special_token_0|>",
        0,
    ),
}


def save_vision(family: str, folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The weights of a tiny random ViT, and the folder that holds it and its image processor."""
    torch.manual_seed(0)
    if family == "timm":  # the layout of the Hub's "timm/...": no `model_type`, and timm's own names of the weights
        size = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4}
        tower = timm.create_model("vit_tiny_patch16_224", num_classes=3, **size)
        tower.pretrained_cfg.update({"mean": MEAN, "std": STD})
        timm.models.save_for_hf(tower, folder, model_args=size, safe_serialization=True)
    else:
        settings, image_processor = VISION[family]
        tower = AutoModel.from_config(AutoConfig.for_model(family, **settings))
        tower.save_pretrained(folder)
        image_processor(image_mean=list(MEAN), image_std=list(STD)).save_pretrained(folder)
    return getattr(tower, "vision_model", tower).state_dict(), str(folder)


def save_text(family: str, folder: Path) -> str:
    """A tiny random language model with a tokenizer of bytes; a chat template of its own refuses whatever comes."""
    model_type, special, end, padding, spare_rows, *_ = TEXT[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate([*alphabet, *special])}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    backend = TokenizersBackend(
        tokenizer_object=tokenizer, eos_token=end, pad_token=padding, extra_special_tokens=special
    )
    if end == "<|im_end|>":
        backend.chat_template = "{{ raise_exception('the own template of the tokenizer') }}"
    backend.save_pretrained(folder)
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokens) + spare_rows,
        tie_word_embeddings=family != "llama base",
        head_dim=8,
        eos_token_id=tokens[end],
        bos_token_id=None,
        **DECODER,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def save_composite(folder: Path) -> str:
    """A language model whose repository also has a vision half, with the tokenizer of `save_text`."""
    text = save_text("qwen3", folder)
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    for file in folder.glob("*model*"):
        file.unlink()
    layers = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    config = AutoConfig.for_model(
        "qwen3_5",
        text_config={**DECODER, **layers, "vocab_size": vocabulary, "head_dim": 8, "tie_word_embeddings": True},
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32},
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return text


def encode(processor, pairs):
    """A batch of two prompts of different lengths, padded."""
    texts = [processor.prompt(), processor.prompt("What changed ?")]
    return processor(images=pairs, text=texts, padding=True, return_tensors="pt")


def check_that_it_runs(model, processor, pairs):
    """Both losses reach every parameter, and a padded batch generates."""
    inputs = encode(processor, pairs)
    mask_labels = torch.ones(2, *inputs["pixel_values"].shape[-2:], dtype=torch.long)
    model(**inputs, labels=inputs["input_ids"], mask_labels=mask_labels).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


@pytest.fixture
def pairs(make_pair):
    return [make_pair(40, 30), make_pair(40, 30, (0, 0, 9, 9))]


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """Folder of a ViT for the tests of language models."""
    return save_vision("clip", tmp_path_factory.mktemp("vision"))[1]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Folder of a language model for the tests of vision towers."""
    return save_text("qwen2.5", tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("family", [*VISION, "timm"])
def test_a_vit_of_any_family_is_joined_with_its_weights_and_normalisation(family, tmp_path, text, pairs):
    weights, folder = save_vision(family, tmp_path)
    model, processor = join_towers(folder, text, visual_token_pooling=2)
    tower = model.model.vision_tower
    joined = getattr(tower, "timm_model", tower).state_dict()
    assert joined and all(torch.equal(weight, weights[name]) for name, weight in joined.items())
    assert (processor.image_processor.image_mean, processor.image_processor.image_std) == (MEAN, STD)
    assert (model.config.image_size, model.config.patch_size, processor.num_patches) == (32, 8, 4)
    check_that_it_runs(model, processor, pairs)


@pytest.mark.parametrize("family", TEXT)
def test_a_language_model_of_any_family_is_joined_with_an_image_token(family, tmp_path, vision, pairs):
    folder = save_text(family, tmp_path)
    _, _, end, padding, _, image_token, gained = TEXT[family]
    rows = AutoConfig.from_pretrained(folder).vocab_size
    model, processor = join_towers(vision, folder)
    assert processor.image_token == image_token
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids(image_token)
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == rows + gained
    assert processor.tokenizer.pad_token == (padding or end)
    assert ("<|im_start|>" in processor.prompt()) is (end == "<|im_end|>")
    generation = model.generation_config
    assert not generation.do_sample and processor.tokenizer.convert_tokens_to_ids(end) in generation.eos_token_id
    check_that_it_runs(model, processor, pairs)


def test_of_a_composite_model_the_language_model_is_joined(tmp_path, vision, pairs):
    model, processor = join_towers(vision, save_composite(tmp_path))
    assert model.config.text_config.model_type == "qwen3_5_text"
    assert model.config.text_config.vocab_size == model.lm_head.out_features
    check_that_it_runs(model, processor, pairs)


def test_of_a_kcfi_model_the_language_model_is_joined(vision, pairs):
    tiny = KCFIForConditionalGeneration.from_pretrained(embedded_model(), dtype=torch.float32)
    model, processor = join_towers(vision, "kcfi-tiny")
    theirs = tiny.model.language_model.state_dict()
    ours = model.model.language_model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert torch.equal(model.lm_head.weight, tiny.lm_head.weight)
    assert model.config.image_token_id == tiny.config.image_token_id
    check_that_it_runs(model, processor, pairs)


def test_what_is_no_causal_language_model_is_bad_input(vision):
    with pytest.raises(kcfi.processing.InputError, match="CLIPConfig"):
        join_towers(vision, vision)


def test_a_model_with_a_new_image_token_and_its_processor_survive_saving(tmp_path, vision, pairs):
    model, processor = join_towers(vision, save_text("smollm2", tmp_path / "text"))
    model.save_pretrained(tmp_path / "joined")
    processor.save_pretrained(tmp_path / "joined")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "joined")
    inputs = encode(AutoProcessor.from_pretrained(tmp_path / "joined"), pairs)
    assert torch.equal(inputs["input_ids"], encode(processor, pairs)["input_ids"])
    assert torch.equal(again.generate(**inputs, max_new_tokens=4), model.generate(**inputs, max_new_tokens=4))


def test_images_are_cropped_where_their_scale_is_to_be_kept(vision, text):
    _, processor = join_towers(vision, text, shortest_edge=40)
    assert processor.image_processor.do_center_crop and processor.num_patches == 16


def test_a_tower_of_random_weights_is_a_config(text):
    model, processor = join_towers({"model_type": "vit", **MLP}, text, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and processor.image_processor.image_mean == (0.485, 0.456, 0.406)


def test_towers_are_taken_at_the_revision_that_is_asked_for(vision, text, tmp_path, monkeypatch):
    """Failed before: join_towers took `vision_revision` for a setting of the model."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name, folder in (("vit", vision), ("lm", text)):
        for number, revision in enumerate(("main", "v1")):  # the weights of v1 are those of main plus 1
            snapshot = tmp_path / f"models--me--{name}" / "snapshots" / (f"{number}" * 40)
            shutil.copytree(folder, snapshot)
            weights = load_file(snapshot / "model.safetensors")
            save_file({key: value + number for key, value in weights.items()}, snapshot / "model.safetensors", META)
            reference = tmp_path / f"models--me--{name}" / "refs" / revision
            reference.parent.mkdir(exist_ok=True)
            reference.write_text(f"{number}" * 40)
    newest, _ = join_towers("me/vit", "me/lm")
    asked, _ = join_towers("me/vit", "me/lm", vision_revision="v1", text_revision="v1")
    for part in ("vision_tower", "language_model"):
        parts = [dict(getattr(model.model, part).named_parameters()) for model in (newest, asked)]
        name = next(name for name in parts[0] if "proj" in name or "query" in name)
        torch.testing.assert_close(parts[1][name], parts[0][name] + 1)
    with pytest.raises(OSError, match="Cannot load 'me/lm' at revision 'v2': "):
        join_towers("me/vit", "me/lm", text_revision="v2")


@pytest.mark.parametrize("missing", ["vision", "text"])
def test_a_tower_that_cannot_be_loaded_is_named(vision, text, missing):
    towers = {"vision": vision, "text": text, missing: "nobody/nothing"}
    with pytest.raises(OSError, match="Cannot load 'nobody/nothing': "):
        join_towers(towers["vision"], towers["text"])


@pytest.mark.slow
@pytest.mark.skipif(not TOWERS.is_dir(), reason="KCFI_TOWERS names no folder of real towers")
def test_real_towers_become_the_model_of_their_card_and_describe_a_pair():
    folder = Path(embedded_model()).parent / "kcfi-dinov2s-smollm2-135m"
    config = KCFIConfig.from_pretrained(folder)
    model, processor = join_towers(
        str(TOWERS / "dinov2-small"),
        str(TOWERS / "smollm2-135m-instruct"),
        image_size=config.image_size,
        visual_token_pooling=config.visual_token_pooling,
        change_context=config.change_context,
        num_change_classes=config.num_change_classes,
    )
    assert model.config.image_token_id == config.image_token_id == 49152
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"| total | {total:,} |" in (folder / "README.md").read_text(encoding="utf-8")

    example = Path(kcfi.__file__).parent / "example"
    pair = [Image.open(example / f"{date}.png") for date in ("before", "after")]
    inputs = processor(images=[pair], text=[processor.prompt()], return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).mask_logits.shape == (1, 3, 252, 252)
    tokens = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    [sentence] = processor.post_process_image_text_to_text(tokens)
    assert re.search("[a-z]{2}", sentence), sentence  # perceiver and projector are untrained: words, no meaning
