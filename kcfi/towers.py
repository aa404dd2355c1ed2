"""Two pretrained towers -> a KCFI model and the processor that matches it."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    TimmWrapperImageProcessor,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from kcfi.files import check_names
from kcfi.modeling_kcfi import KCFIConfig, KCFIForConditionalGeneration
from kcfi.modeling_kcfi.modeling_kcfi import load_tower
from kcfi.models import embedded_model
from kcfi.processing import InputError, KCFIProcessor


@contextmanager
def refusals() -> Iterator[None]:
    """Where settings of the user become a model: what is refused there is bad input, not a bug.

    Raises:
        InputError: for whatever `KCFIConfig`, `from_pretrained` and safetensors refuse of what they are given.
        OSError: what is not there, by its name.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, StrictDataclassError, SafetensorError) as error:
        raise InputError(str(error)) from error


@refusals()
def join_towers(
    vision: str | dict[str, Any],
    text: str,
    shortest_edge: int | None = None,
    dtype: torch.dtype = torch.float32,
    vision_revision: str | None = None,
    text_revision: str | None = None,
    **settings: Any,
) -> tuple[KCFIForConditionalGeneration, KCFIProcessor]:
    """Join a ViT and a causal language model; perceiver, projector and head start from random weights.

    The processor normalises as the vision tower was trained, cuts images and prompts as the model reads them, and
    chooses the `<image>` token, a spare one of the tokenizer where there is one.

    Args:
        vision: Hub id or folder of a ViT with its image processor (ViT, DINOv2, CLIP, SigLIP, or timm's
            "timm/vit_base_patch16_224.augreg_in21k"); or a dict, the config of a tower that starts from random weights
            and gets ImageNet's normalisation.
        text: Hub id or folder of a causal language model with its tokenizer, or of a KCFI model (also
            "kcfi-tiny"), for its own.
        shortest_edge: resize the shorter side of images to so many pixels and crop the centre (the `released` recipe);
            None = resize whole images.
        dtype: of the whole model.
        vision_revision: branch, tag or commit of `vision` on the Hub (None: the newest).
        text_revision: likewise of `text`.
        **settings: fields of `KCFIConfig` but the towers and `image_token_id`.

    Returns:
        The model, in evaluation mode and decoding greedily, and its processor.

    Raises:
        InputError: an unknown setting, or settings that do not fit the towers; a tokenizer without an end token, or a
            language model whose logits are not a plain linear map of its last state.
        OSError: a tower, its image processor or its tokenizer is not there.

    Example:
        >>> towers = "facebook/dinov2-small", "HuggingFaceTB/SmolLM2-135M-Instruct"
        >>> model, processor = join_towers(*towers, image_size=252, visual_token_pooling=2)
        >>> model.config.num_patches, processor.num_patches, processor.image_token
        (324, 81, '<image>')
    """
    text = embedded_model() if text == "kcfi-tiny" else text
    check_names(settings, [field.name for field in dataclasses.fields(KCFIConfig)], "model setting")
    tower: Any = vision
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if isinstance(vision, str):
        tower = _load(AutoConfig, vision, vision_revision)
        tower = getattr(tower, "vision_config", tower)  # CLIP and SigLIP have two halves
        pixels = _load(AutoImageProcessor, vision, vision_revision)
        if isinstance(pixels, TimmWrapperImageProcessor):
            mean, std = pixels.data_config["mean"], pixels.data_config["std"]
        else:
            mean, std = pixels.image_mean, pixels.image_std
    # refuses settings before anything large is loaded; the language model's part follows below
    config: Any = KCFIConfig(vision_config=tower, **settings)
    processor = KCFIProcessor.from_towers(
        _load(AutoTokenizer, text, text_revision),
        image_mean=mean,
        image_std=std,
        image_size=config.image_size,
        patch_size=config.visual_token_size,
        visual_inputs=config.visual_inputs,
        shortest_edge=shortest_edge,
    )
    # its config from itself: of a composite model AutoConfig would give the whole
    language_model = _language_model(text, text_revision, dtype)
    placeholder: Any = processor.image_token_id
    if placeholder >= language_model.config.vocab_size:
        language_model.resize_token_embeddings(placeholder + 1)
    config.text_config, config.image_token_id = language_model.config, placeholder
    tied = settings.get("tie_word_embeddings", False)
    config.tie_word_embeddings = tied or language_model.config.tie_word_embeddings
    config.validate_architecture()
    if isinstance(vision, str):
        kwargs = {"revision": vision_revision, "config": config.vision_config, "dtype": dtype}
        vision_tower = load_tower(AutoModel, vision, **kwargs)
    else:
        vision_tower = AutoModel.from_config(config.vision_config, dtype=dtype)
    model = KCFIForConditionalGeneration.from_towers(config, vision_tower, language_model)
    model.generation_config.update(**processor.generation_tokens)
    config.vision_config.name_or_path = config.text_config.name_or_path = ""  # folders of this machine
    return model, processor


def _language_model(name: str, revision: str | None, dtype: torch.dtype) -> Any:
    """A causal language model, also out of a KCFI model."""
    if _load(AutoConfig, name, revision).model_type != KCFIConfig.model_type:
        return load_tower(AutoModelForCausalLM, name, revision=revision, dtype=dtype)
    whole: Any = load_tower(KCFIForConditionalGeneration, name, revision=revision, dtype=dtype)
    model = AutoModelForCausalLM.from_config(whole.config.text_config, dtype=dtype)
    model.base_model.load_state_dict(whole.model.language_model.state_dict())
    model.get_output_embeddings().load_state_dict(whole.lm_head.state_dict())
    model.generation_config = whole.generation_config
    return model


def _load(kind: Any, name: str, revision: str | None) -> Any:
    """`kind.from_pretrained(name)`, with the name in its error: without a connection transformers tells none."""
    try:
        return kind.from_pretrained(name, revision=revision, trust_remote_code=False)
    except OSError as error:
        at = f" at revision {revision!r}" if revision else ""
        raise OSError(f"Cannot load {name!r}{at}: {error}") from error
