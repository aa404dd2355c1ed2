"""FeatureCache: what a frozen vision tower says of an image is computed once and read from disk ever after."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import BaseModelOutput

from kcfi.modeling_kcfi import KCFIModel


class FeatureCache:
    """A `KCFIModel.stage_cache` for a model whose tower is frozen.

    An image's features lie in FOLDER/<tower>/<image>.safetensors. Both names are hashes: of the tower's weights, its
    config and the blocks that are read; of the pixels that the tower gets and its autocast. So another tower, other
    preprocessing or another image of the same name never finds a stale entry, and runs and ranks may share a folder.

    Args:
        model: its tower is frozen and has no dropout in training.
        folder: made when missing. An image takes L x C x N numbers: 2 MB with four stages of DINOv2-S at 252 px.
    """

    def __init__(self, model: KCFIModel, folder: str | Path) -> None:
        self.encode = model.encode_dates
        self.read = 0
        self.computed = 0
        self.folder = Path(folder) / _hash(model)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], BaseModelOutput]:
        """As `KCFIModel.get_stage_features`; of the tower's own output there is its last stage alone."""
        images = pixel_values.flatten(0, 1)
        files = [self._file(image) for image in images]
        missing = [index for index, file in enumerate(files) if not file.exists()]
        self.read += len(files) - len(missing)
        self.computed += len(missing)
        if missing:
            # the tower takes pairs: the last missing image is its own partner where their number is odd
            rows = missing + missing[-1:] * (len(missing) % 2)
            with torch.no_grad():
                before, after, _ = self.encode(images[rows].unflatten(0, (-1, 2)), **kwargs)
            stages = [torch.stack(pair, dim=1).flatten(0, 1) for pair in zip(before, after, strict=True)]
            for row, index in enumerate(missing):
                self._write(files[index], [stage[row] for stage in stages])
        entries = [load_file(file, device=str(pixel_values.device)) for file in files]
        maps = [torch.stack([entry[name] for entry in entries]) for name in entries[0]]  # (2B,C,h,w) each
        outputs = BaseModelOutput(last_hidden_state=maps[-1].flatten(2).transpose(1, 2))
        return [stage[0::2] for stage in maps], [stage[1::2] for stage in maps], outputs

    def _file(self, image: torch.Tensor) -> Path:
        device = image.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else "as it is"
        name = _digest(f"{tuple(image.shape)} {precision}".encode(), _bytes(image))
        return self.folder / f"{name}.safetensors"

    def _write(self, file: Path, stages: list[torch.Tensor]) -> None:
        part = file.with_suffix(f".{os.getpid()}.part")  # complete or invisible, also to other ranks
        save_file({f"stage_{number}": stage.cpu().contiguous() for number, stage in enumerate(stages)}, part)
        part.replace(file)


def _hash(model: KCFIModel) -> str:
    about = f"{model.config.vision_config.to_json_string()} {model.config.vision_feature_layers}"
    weights = (_bytes(weight) for weight in model.vision_tower.state_dict().values())
    return _digest(about.encode(), *weights)


def _digest(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
