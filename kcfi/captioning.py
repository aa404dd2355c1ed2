"""Load a model, and write pictures of what it says: what `kcfi caption` does around a `Describer`.

The describing itself travels with the model (`processing/describer_kcfi.py`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, CompileConfig

from kcfi.pictures import heat_map, overlay
from kcfi.processing import ChangeReport, Describer, InputError
from kcfi.towers import refusals
from kcfi.training.arguments import model_source, optional_fields, read_yaml
from kcfi.training.data.levir_cc import MASK_BUILDING, MASK_ROAD, NO_LABEL

__all__ = ["ChangeReport", "Describer", "load", "mask_picture", "save_pictures"]


def default_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load(name: str, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """Model (in evaluation mode) and processor of a folder, Hub id or "kcfi-tiny".

    Args:
        name: of the model.
        device: as torch names it, "cuda:1"; None = `default_device`.
        dtype: "float32", "bfloat16" or "float16"; None = as it was saved on CUDA, float32 elsewhere.

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
    with refusals(f"Cannot load the model {name!r}: "):
        kind = AutoConfig.from_pretrained(source).model_type
        if kind != "kcfi":
            raise InputError(f"Cannot load the model {name!r}: it is a model of type {kind!r}, not 'kcfi'.")
        model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=chosen)
        processor = AutoProcessor.from_pretrained(source)
    return model.to(place).eval(), processor


def validation_dtype(model: str, device: torch.device) -> torch.dtype | None:
    """What the run that made a model computed its validation scores in: bf16 or fp16 by autocast; None = as saved.

    Only on CUDA, where recipes ask for it: most CPUs are slow in bf16.
    """
    recipe = Path(model) / "recipe.yaml"
    if device.type != "cuda" or not recipe.is_file():
        return None
    settings = read_yaml(recipe, optional_fields())
    return torch.bfloat16 if settings.get("bf16") else torch.float16 if settings.get("fp16") else None


def compiled_steps() -> dict[str, Any]:
    """Arguments of `generate()` that let `torch.compile` translate the steps that write a sentence.

    With a cache of fixed size; the sentences stay the same. Each number of pairs at a time costs a translation.
    """
    settings = CompileConfig()
    settings._compile_all_devices = True  # type: ignore[assignment]  # else `generate` does it on a GPU alone
    return {"cache_implementation": "static", "compile_config": settings}


def mask_picture(mask: NDArray[np.uint8], num_classes: int) -> Image.Image:
    """Class ids (H, W) -> grey values of LEVIR-MCI's masks: 0, 128 road, 255 building (or change).

    Pixels that the model did not see are 0.
    """
    values = np.zeros(256, np.uint8)
    values[1:num_classes] = [MASK_BUILDING] if num_classes == 2 else [MASK_ROAD, MASK_BUILDING]
    return Image.fromarray(values[mask])


def save_pictures(
    report: ChangeReport, after: Image.Image, output: Path, name: str, num_classes: int, heatmap: bool = False
) -> dict[str, str]:
    """Write what there is to see of a pair as OUTPUT/NAME_mask.png, NAME_overlay.png and NAME_heatmap.png.

    Args:
        report: of the pair.
        after: its later image.
        output: folder, which exists.
        name: of the pair.
        num_classes: of the model's mask.
        heatmap: also draw the strength of the key change features.

    Returns:
        The paths, by kind; no mask and no overlay without a change detection head.
    """
    pictures = {}
    if report.mask is not None:
        pictures["mask"] = mask_picture(report.mask, num_classes)
        pictures["overlay"] = overlay(after, np.where(report.mask == NO_LABEL, 0, report.mask))
    if heatmap:
        pictures["heatmap"] = heat_map(after, report.key_changes)
    paths = {kind: output / f"{name}_{kind}.png" for kind in pictures}
    for kind, picture in pictures.items():
        picture.save(paths[kind])
    return {kind: str(path) for kind, path in paths.items()}
