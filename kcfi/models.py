"""The name of a model -> the model and its processor, ready to describe pairs."""

import hashlib
import re
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, CompileConfig
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from kcfi.files import read_yaml
from kcfi.modeling_kcfi import KCFIForConditionalGeneration
from kcfi.processing import INSTRUCTIONS, Describer, InputError, refusing
from kcfi.speed import Speed, speed_up

# Of models whose settings name code of their own: refused; transformers would ask on the terminal, and run it
NO_CODE: dict[str, Any] = {"trust_remote_code": False}


def default_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load(
    name: str, device: str | None = None, dtype: str | None = None, revision: str | None = None
) -> tuple[Any, Any]:
    """Model (in evaluation mode) and processor of a folder, Hub id or "kcfi-tiny".

    Args:
        name: of the model.
        device: as torch names it, "cuda:1"; None = `default_device`. On "meta" no weights are read.
        dtype: "float32", "bfloat16" or "float16"; None = as it was saved on CUDA, float32 elsewhere.
        revision: branch, tag or commit of a Hub id; None = the newest.

    Raises:
        InputError: it cannot be loaded, is no KCFI model, or the device is not there; says why.
    """
    try:
        place = default_device() if device is None else torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without CUDA
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error
    chosen: Any = dtype or ("auto" if place.type == "cuda" else "float32")
    source = model_source(name)
    with refusing(f"Cannot load the model {name!r}"):
        hub: dict[str, Any] = {"revision": revision, **NO_CODE}
        config = AutoConfig.from_pretrained(source, **hub)
        kind = config.model_type
        if kind != "kcfi":
            raise InputError(f"Cannot load the model {name!r}: it is a model of type {kind!r}, not 'kcfi'.")
        commit = _commit(source, revision)
        hub["revision"] = commit or revision  # one for all files, though the Hub gets a newer one meanwhile
        model: Any
        if place.type == "meta":
            with place:
                model = AutoModelForImageTextToText.from_config(config, **NO_CODE)
        else:
            model = AutoModelForImageTextToText.from_pretrained(source, dtype=chosen, **hub)
        processor = AutoProcessor.from_pretrained(source, **hub)
    model.config._commit_hash = commit  # transformers 5.24 says it nowhere
    return model.to(place).eval(), processor


def build_describer(
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    tile: int | None = None,
    batch_size: int = 8,
    instruction: str | None = None,
    alarm_rate: float | None = None,
    compiled: bool = False,
    speed: Speed = "auto",
    revision: str | None = None,
) -> Describer:
    """The Describer of a model by its name.

    Args:
        model: folder, Hub id or "kcfi-tiny".
        device: see `load`.
        dtype: see `load`; None = computing as the run that made the model did, see `validation_dtype`.
        tile: see `Describer`.
        batch_size: see `Describer`.
        instruction: see `Describer`; None = the first of the paper.
        alarm_rate: see `Describer`.
        compiled: see `compiled_steps`.
        speed: how the vision tower is run, see `kcfi.speed`.
        revision: see `load`.

    Raises:
        InputError: the model cannot be loaded, or a setting does not fit it.
    """
    network, processor = load(model, device, dtype, revision)
    autocast = None if dtype else validation_dtype(model, network.device)
    settings = (tile, batch_size, instruction or INSTRUCTIONS[0], autocast, alarm_rate)
    describer = Describer(network, processor, *settings, **(compiled_steps() if compiled else {}))
    describer.expect = partial(speed_up, describer, speed)
    describer.expect(1)  # refuses a speed that cannot be had
    return describer


def weights_of(name: str) -> str:
    """A name for the weights of a model that is not loaded: they differ, so does it.

    Args:
        name: folder, Hub id or "kcfi-tiny".

    Returns:
        A digest of the weights and settings in a folder; of a Hub id the commit.

    Raises:
        InputError: there is no such model.
    """
    source = model_source(name)
    if not Path(source).is_dir():
        with refusing(f"Cannot load the model {name!r}"):
            return str(_commit(source))
    digest = hashlib.sha256()
    kinds = (".safetensors", ".json", ".jinja")  # weights; settings, calibration, tokens; the prompt
    for path in sorted(path for path in Path(source).iterdir() if path.suffix in kinds):
        with path.open("rb") as file:
            digest.update(path.name.encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _commit(source: str, revision: str | None = None) -> str | None:
    """The commit of a model of the Hub; None of a folder that is no snapshot of one."""
    return extract_commit_hash(cached_file(source, CONFIG_NAME, revision=revision), None)


def validation_dtype(model: str, device: torch.device) -> torch.dtype | None:
    """What the run that made a model computed its validation scores in: bf16 or fp16 by autocast; None = as saved.

    Only on CUDA, where recipes ask for it: most CPUs are slow in bf16.
    """
    recipe = Path(model) / "recipe.yaml"
    if device.type != "cuda" or not recipe.is_file():
        return None
    settings = read_yaml(recipe, optional=None)
    return torch.bfloat16 if settings.get("bf16") else torch.float16 if settings.get("fp16") else None


def compiled_steps() -> dict[str, Any]:
    """Arguments of `generate()` that let `torch.compile` translate the steps that write a sentence.

    With a cache of fixed size; the sentences stay the same. Each number of pairs at a time costs a translation.
    """
    settings = CompileConfig()
    settings._compile_all_devices = True  # type: ignore[assignment]  # else `generate` does it on a GPU alone
    return {"cache_implementation": "static", "compile_config": settings}


def embedded_model() -> str:
    """Folder of `kcfi-tiny`, the model that is installed with the package."""
    return str(files("kcfi.hub_configs") / "kcfi-tiny")


def model_source(model: str) -> str:
    """What `from_pretrained` takes for the name of a model: "kcfi-tiny" is the embedded one.

    A name that begins with a folder of this machine, like "runs/paper", is never looked up on the Hub.

    Raises:
        InputError: a path where there is no folder.
    """
    if model == "kcfi-tiny":
        return embedded_model()
    if Path(model).is_dir():
        return model
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model):
        raise InputError(f"No model {model}: it is neither a folder nor a Hub id (`owner/name`).")
    first, slash, name = model.partition("/")
    if slash and Path(first).is_dir():
        raise InputError(
            f"No model {model}: the folder {first} is here and holds no folder {name}. If you mean a model of the "
            f"Hub, `hf download {model} --local-dir {model}` puts it there."
        )
    return model


def merge_lora(model: KCFIForConditionalGeneration) -> KCFIForConditionalGeneration:
    """Add an adapter to the weights, in place: a plain model with equal outputs. Without one nothing happens."""
    if not model._hf_peft_config_loaded:
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer  # whoever has no adapter does without peft
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(name, module.unload_and_optionally_merge_module(True, False, None))
        elif isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    # those of the adapter's file: saving would give its names to all weights
    model._weight_conversions = None  # type: ignore[assignment]
    model.requires_grad_(True)
    return model


def public_name(model: str) -> str:
    """A model's name for others: of a folder its last part, where it lies is nobody's business."""
    return Path(model).resolve().name if Path(model).is_dir() else model
