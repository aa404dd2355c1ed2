"""DeepSpeed's ZeRO: the packaged settings by name, what must be there before it starts, and split parameters."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from kcfi.processing import InputError

SETTINGS = Path(__file__).parent / "deepspeed"


def find_settings(name: str) -> Path:
    """The DeepSpeed file of a path, or the packaged one of that name ("zero2").

    Raises:
        InputError: neither exists; the message lists the packaged ones.
    """
    packaged = {path.stem: path for path in sorted(SETTINGS.glob("*.json"))}
    path = packaged.get(name, Path(name))
    if not path.is_file():
        raise InputError(
            f"No DeepSpeed settings {name}: give a JSON file, or one of the packaged ones: {', '.join(packaged)}."
        )
    return path


def require_deepspeed(use_cpu: bool) -> None:
    """Look for all that DeepSpeed needs, before data and model are loaded.

    Args:
        use_cpu: train on the CPU even where there is a GPU.

    Raises:
        InputError: the package, the launcher, or what it compiles with on a CPU is missing.
    """
    if find_spec("deepspeed") is None:
        raise InputError('DeepSpeed is not installed: `pip install "kcfi[deepspeed]"`, or train without `deepspeed`.')
    if "LOCAL_RANK" not in os.environ:
        raise InputError(
            "DeepSpeed needs a launcher, for a single process too: torchrun --nproc_per_node 1 -m kcfi_cli train ..."
        )
    if use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it takes the GPU
    if use_cpu or not torch.cuda.is_available():
        tools = {name: shutil.which(name) for name in (os.environ.get("CXX", "c++"), "ninja")}
        header = Path(sysconfig.get_path("include")) / "Python.h"
        missing = [name for name, path in tools.items() if path is None] + [str(header)] * (not header.is_file())
        if missing:
            raise InputError(
                f"On a CPU, DeepSpeed compiles its communication once per environment; missing: {', '.join(missing)}. "
                "Install a C++ compiler and Python's headers (Debian and Ubuntu: apt install g++ python3-dev); ninja "
                "comes with DeepSpeed and is found once the environment is activated."
            )


@contextmanager
def whole_weights(args: TrainingArguments) -> Iterator[None]:
    """Inside, models are built whole under ZeRO-3 too; DeepSpeed splits them when training begins.

    Else transformers would split every part as soon as it is made, and the towers could not be looked into, trimmed
    and joined. Every process holds the whole model for that moment.
    """
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)


def gathered(module: nn.Module) -> AbstractContextManager[None]:
    """Inside, the parameters of a module are whole, also if ZeRO-3 has split them; all ranks enter together."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(module.parameters()))
