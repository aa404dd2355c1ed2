"""Which parameters of a model train, and at which rate."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kcfi.modeling_kcfi import KCFIForConditionalGeneration
from kcfi.training.arguments import KCFITrainingArguments


def freeze(model: KCFIForConditionalGeneration, args: KCFITrainingArguments) -> list[nn.Module]:
    """Switch gradients off where `args` say so, after loading, since loading switches them on.

    A language model with adapters stays in training mode: all but them is frozen already, and they may have dropout.
    With `args.bf16_language_model` its frozen weights become bf16.

    Returns:
        What must run in evaluation mode: frozen modules that have dropout, and batch norms, whose statistics would
        depend on how an optimizer step is cut into micro-batches and ranks (a tower brings its own). All else stays in
        training mode, because transformers checkpoints activations only there.
    """
    frozen = []
    if not args.train_language_model and not model._hf_peft_config_loaded:
        frozen += [model.model.language_model, model.lm_head]
    if not args.train_vision_tower:
        frozen.append(model.model.vision_tower)
    for module in frozen:
        module.requires_grad_(False)
    if args.bf16_language_model:
        cast_frozen_language_model(model, torch.bfloat16)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return [module for module in frozen if _has_dropout(module)] + norms


def cast_frozen_language_model(model: KCFIForConditionalGeneration, dtype: torch.dtype) -> None:
    """Give the frozen weights of the language model another type; not its buffers: rotary frequencies need fp32."""
    for weight in [*model.model.language_model.parameters(), *model.lm_head.parameters()]:
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)


def _has_dropout(module: nn.Module) -> bool:
    """Whether a module drops anything out: by its layers, or by its config (attention reads the config)."""
    settings = module.config.to_dict() if isinstance(module, PreTrainedModel) else {}
    rates = [value for name, value in settings.items() if "dropout" in name or "pdrop" in name]
    rates += [layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)]
    return any(rates)


def parameter_groups(
    model: KCFIForConditionalGeneration, args: KCFITrainingArguments, decayed: list[str]
) -> list[dict[str, Any]]:
    """Optimizer groups: (all else, vision tower, projector) x (with, without weight decay), empty ones left out.

    For `args.muon` those of the two towers are apart, and have "use_fallback", which is NAdamW.

    Args:
        model: after `freeze`.
        args: the three learning rates, the weight decay and `muon`.
        decayed: names of the parameters that decay (no biases, no norms).

    Returns:
        Groups with "name", "params", "lr" and "weight_decay"; every trainable parameter is in exactly one.
    """
    rates = {
        "": args.learning_rate,
        "vision_": args.vision_learning_rate,
        "projector_": args.projector_learning_rate,
    }
    parts = {"vision_": model.model.vision_tower, "projector_": model.model.projector}
    owner = {id(parameter): name for name, part in parts.items() for parameter in part.parameters()}
    pretrained = [model.model.vision_tower, model.model.language_model, model.lm_head]
    towers = {id(parameter) for part in pretrained for parameter in part.parameters()}
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 may have split it
            wide = sum(size > 1 for size in shape) > 1  # unlike batch norms and layer scales, which have other names
            decays = name in decayed and wide
            by_nadamw = args.muon and id(parameter) in towers
            groups.setdefault((owner.get(id(parameter), ""), decays, by_nadamw), []).append(parameter)

    placed = [id(parameter) for parameters in groups.values() for parameter in parameters]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(placed) == sorted(trainable), "every trainable parameter must be in exactly one optimizer group"
    return [
        {
            "name": f"{part}learning_rate",
            "params": parameters,
            "lr": rates[part],
            "weight_decay": args.weight_decay if decay else 0.0,
            **({"use_fallback": True} if by_nadamw else {}),
        }
        for (part, decay, by_nadamw), parameters in sorted(
            groups.items(), key=lambda item: (item[0][0], not item[0][1], item[0][2])
        )
    ]
