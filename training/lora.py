"""LoRA on the language model, through `peft`: what a recipe's `lora:` block makes of a model, and how it is saved.

The paper keeps the language model frozen. With adapters it stays frozen too, but for two small matrices beside each of
its linear layers; tower, perceiver, projector and head train as they do without. A saved folder holds two models:

- `model.safetensors`: where the run started.
- `adapter_model.safetensors`: all that it has learned, the adapters and the modules trained beside them.

So the folder loads by `AutoModelForImageTextToText.from_pretrained` as it is, and its adapter by
`PeftModel.from_pretrained` onto the model the run started from.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from kcfi.files import check_names
from kcfi.modeling_kcfi import KCFIForConditionalGeneration
from kcfi.processing import InputError
from kcfi.training.arguments import KCFITrainingArguments

OURS = ("exclude_modules", "modules_to_save")  # fields of LoraConfig that keep to the rule above
OUTSIDE = r"(?!model\.language_model\.).*"  # tower and head have layers of the same names


def add_lora(model: KCFIForConditionalGeneration, settings: dict[str, Any], args: KCFITrainingArguments) -> None:
    """Put adapters beside linear layers of the language model and freeze its own weights.

    Args:
        model: without adapters.
        settings: fields of `peft.LoraConfig`; `target_modules` are all linear layers if it is not among them.
        args: whether the vision tower trains.

    Raises:
        InputError: an unknown or unfit setting, or the language model is to be trained as a whole.
    """
    if args.train_language_model:
        raise InputError("lora adapts a frozen language model: leave out lora, or train_language_model.")
    names = [field.name for field in dataclasses.fields(LoraConfig) if field.name not in OURS]
    check_names(settings, names, "entry of lora")
    frozen = {"language_model"} if args.train_vision_tower else {"language_model", "vision_tower"}
    trained = [name for name, _ in model.model.named_children() if name not in frozen]
    try:
        config = LoraConfig(
            **{"target_modules": "all-linear", **settings}, exclude_modules=OUTSIDE, modules_to_save=trained
        )
        model.add_adapter(config)
    except (TypeError, ValueError) as error:
        raise InputError(f"lora: {error}") from error


def save_start(
    model: KCFIForConditionalGeneration, folder: str | Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Save the model that the adapter stands on, as it was before it; transformers saves the adapter alone.

    Args:
        model: with an adapter.
        folder: where the adapter is saved.
        weights: its state dict, where it had to be gathered.
    """
    with torch.device("meta"):
        plain = type(model)(model.config)
    wanted = plain.state_dict()
    start = {}
    for name, weight in (weights or model.state_dict()).items():
        plain_name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if plain_name in wanted:
            start[plain_name] = weight
    plain.save_pretrained(folder, state_dict=start)
