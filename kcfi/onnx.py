"""Parts of a model as ONNX files: the mask without the sentence, and the vision tower alone.

Whoever needs only where something changed runs a `Detector` in onnxruntime, without a language model and torch. A
`Tower` is what `kcfi.speed` runs in place of the model's own.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kcfi.modeling_kcfi import KCFIForConditionalGeneration
from kcfi.processing import InputError


class Detector(nn.Module):
    """The part of a model that reads no text, for `export_detector` and `torch.export.export`.

    Pixel values (B, 2, 3, H, W), before then after -> mask logits (B, classes, H, W) and key changes (B, h, w): the
    norm of the key change features of each patch, in the model's own units (the paper's Fig. 1).

    Args:
        model: its weights are shared, not copied.

    Raises:
        InputError: the model has no change detection head.
    """

    def __init__(self, model: KCFIForConditionalGeneration) -> None:
        super().__init__()
        self.model = model.model
        if self.model.change_detection_head is None:
            raise InputError("This model has no change detection head: it cannot find masks.")

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        before, after, _ = self.model.get_stage_features(pixel_values)
        change = self.model.get_change_features(before, after)
        grid = before[0].shape[-2:]
        mask_logits = self.model.change_detection_head(change, grid, pixel_values.shape[-2:])
        key_changes = change[..., : self.model.config.stage_width].norm(dim=-1).unflatten(1, grid)  # no context
        return mask_logits, key_changes


class Tower(nn.Module):
    """The vision tower of a model: pixel values (B, 2, 3, S, S) -> 2 L maps (B, C, h, w), of before and then of after.

    Args:
        model: its weights are shared, not copied.
    """

    def __init__(self, model: KCFIForConditionalGeneration) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        before, after, _ = self.model.encode_dates(pixel_values)
        return *before, *after


def export_detector(model: KCFIForConditionalGeneration, path: str | Path) -> None:
    """Write the `Detector` of a model as an ONNX file.

    Its input is `pixel_values`, float32 (B, 2, 3, S, S), as the image processor makes it: any number of pairs B, of
    the side S = `image_size` of the model's config. Its outputs are `mask_logits` and `key_changes`. Weights of more
    than 2 GB, which such a file cannot hold, are written beside it.

    Args:
        model: in fp32; it is put into evaluation mode.
        path: file to write; its folder is created if missing.

    Raises:
        InputError: torch's exporter is not installed, the model is not in fp32, or it has no change detection head.
    """
    _export(Detector(model.eval()), model, path, ["mask_logits", "key_changes"])


def export_tower(model: KCFIForConditionalGeneration, path: str | Path) -> None:
    """Write the `Tower` of a model as an ONNX file, in the way of `export_detector`.

    Args:
        model: in fp32; it is put into evaluation mode.
        path: file to write; its folder is created if missing.

    Raises:
        InputError: torch's exporter is not installed, or the model is not in fp32.
    """
    stages = range(model.config.num_stages)
    _export(Tower(model.eval()), model, path, [f"{date}_{stage}" for date in ("before", "after") for stage in stages])


def _export(part: nn.Module, model: KCFIForConditionalGeneration, path: str | Path, outputs: list[str]) -> None:
    """Write a part of a model, which takes `pixel_values` and gives `outputs`, as an ONNX file."""
    if find_spec("onnxscript") is None:
        raise InputError('The ONNX exporter is not installed: `pip install "kcfi[onnx]"`.')
    if model.dtype != torch.float32:
        raise InputError(f"The model is in {model.dtype}: load it with dtype=torch.float32, or call model.float().")
    side: Any = model.config.image_size
    program: Any = torch.onnx.export(
        part.eval(),
        (torch.zeros(2, 2, 3, side, side, device=model.device),),  # two pairs: one would be taken for a constant
        dynamo=True,
        input_names=["pixel_values"],
        output_names=outputs,
        dynamic_shapes=({0: torch.export.Dim("pairs")},),
        verbose=False,
    )
    for node in program.model.graph.all_nodes():  # where its line of Python lies on this machine
        node.metadata_props.clear()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path)
