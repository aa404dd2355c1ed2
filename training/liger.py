"""Caption loss by Liger's fused kernel (`use_liger_kernel`): gradients of the logits take the place of the logits."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_liger_kernel_available

from kcfi.modeling_kcfi.modeling_kcfi import CHUNK, KCFIForConditionalGeneration
from kcfi.processing import InputError
from kcfi.training.arguments import KCFITrainingArguments


def caption_loss_of(model: KCFIForConditionalGeneration, args: KCFITrainingArguments) -> Callable[..., torch.Tensor]:
    """What computes the caption loss of a training: the model's own function, or Liger's kernel.

    Raises:
        InputError: `use_liger_kernel` without a GPU or Liger, or with an output layer that the kernel cannot read.
    """
    if not args.use_liger_kernel:
        return model.caption_loss_function
    if args.device.type in ("cpu", "mps"):
        raise InputError("use_liger_kernel: its kernel is written in Triton and needs a GPU; leave it out here.")
    if not is_liger_kernel_available():
        raise InputError("use_liger_kernel needs Liger: `pip install 'kcfi[liger]'`.")
    if type(model.lm_head) is not nn.Linear:
        kind = type(model.lm_head).__name__
        raise InputError(f"use_liger_kernel: the kernel reads a plain nn.Linear, and `lm_head` is a {kind}.")
    if is_deepspeed_zero3_enabled():
        raise InputError("use_liger_kernel: ZeRO-3 keeps only a part of the output layer on each GPU; take ZeRO-2.")
    return fused_caption_loss


def fused_caption_loss(
    lm_head: nn.Module, states: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int
) -> torch.Tensor:
    """`kcfi.modeling_kcfi.modeling_kcfi.chunked_caption_loss` (eq. 8), with the same arguments, by Liger's kernel."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    states, labels = states[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(states.device)
    device = states.device.type  # once, for autocast would cast the weights again for every chunk
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    states, weight = states.to(dtype), lm_head.get_parameter("weight").to(dtype)
    budget = max(1, CHUNK * len(weight) // states.numel())  # about CHUNK positions at a time
    total = liger_fused_linear_cross_entropy(
        states, weight, labels, reduction="sum", accum_dtype=torch.float32, chunk_mem_const=budget
    )
    return total / num_items
