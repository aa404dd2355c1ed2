"""Tiny random models and pairs: 2 stages, 4 x 4 patches, width 32, 99 words."""

import copy

import pytest
import torch

from kcfi.modeling_kcfi import KCFIConfig, KCFIForConditionalGeneration

IMAGE_TOKEN = 4
SIDE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
VISION = {
    "vit": {"model_type": "vit", "intermediate_size": 37, **SIDE},
    "clip": {"model_type": "clip_vision_model", "intermediate_size": 37, "projection_dim": 32, **SIDE},
    "siglip": {"model_type": "siglip_vision_model", "intermediate_size": 37, **SIDE},
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 2, **SIDE},
    "dinov2_with_registers": {"model_type": "dinov2_with_registers", "mlp_ratio": 2, **SIDE},
    "dinov3": {"model_type": "dinov3_vit", "intermediate_size": 37, **SIDE},
    "beit": {"model_type": "beit", "intermediate_size": 37, "use_mask_token": True, **SIDE},
    "timm": {
        "model_type": "timm_wrapper",
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 16, "patch_size": 4, "depth": 3, "embed_dim": 32, "num_heads": 4},
    },
    "xcit": {  # patches of 8 px; its class token comes in behind the blocks
        "model_type": "timm_wrapper",
        "architecture": "xcit_nano_12_p8_224",
        "model_args": {"img_size": 32, "depth": 3, "embed_dim": 32, "num_heads": 4},
    },
}
WORDS = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **WORDS,
}
TEXT = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, **DECODER},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True, **DECODER},
    "llama": {"model_type": "llama", "tie_word_embeddings": False, **DECODER},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **WORDS},
    "opt": {
        "model_type": "opt",
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        **WORDS,
    },
}


@pytest.fixture
def vision():
    """Configs of the vision towers, by name."""
    return copy.deepcopy(VISION)


@pytest.fixture
def text():
    """Configs of five language models, by name."""
    return copy.deepcopy(TEXT)


@pytest.fixture
def make_config():
    def make(vision="vit", text="qwen2", **settings):
        settings = {"image_token_id": IMAGE_TOKEN, "vision_feature_layers": [1, 3], "head_hidden_size": 8, **settings}
        return KCFIConfig(
            vision_config=copy.deepcopy(VISION[vision]), text_config=copy.deepcopy(TEXT[text]), **settings
        )

    return make


@pytest.fixture
def make_model(make_config):
    def make(vision="vit", text="qwen2", **settings):
        torch.manual_seed(0)
        model = KCFIForConditionalGeneration(make_config(vision, text, **settings))
        for name, parameter in model.named_parameters():  # larger than the usual 0.02: differences show
            if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return make


@pytest.fixture
def make_inputs():
    def make(pairs=2, image_tokens=1, size=(16, 16), patch=4, words=6):
        patches = image_tokens * (size[0] // patch) * (size[1] // patch)
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(5, 99, (pairs, words), generator=generator)
        return {
            "input_ids": torch.cat([torch.full((pairs, patches), IMAGE_TOKEN), prompt], dim=1),
            "attention_mask": torch.ones(pairs, patches + words, dtype=torch.long),
            "pixel_values": torch.randn(pairs, 2, 3, *size, generator=generator),
        }

    return make


@pytest.fixture(params=[False, True], ids=["plain", "deterministic"])
def both_algorithms(request):
    """Twice: with the operations that CUDA has no deterministic kernel for, and with those in their place."""
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)
