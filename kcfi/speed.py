"""`--speed`: how the vision tower is run, which takes most of the time of a pair on a CPU.

- "plain": by torch, as in training.
- "onnx": by ONNX Runtime, in fp32: equal up to rounding, which is checked at the start. The tower is exported once per
  model, and kept in `KEPT`.
- "auto": "onnx" where it can be had and pays for so many pairs, else "plain".

A single pair never waits for a start: whoever knows that many pairs (or tiles) come tells `Describer.expect`. What was
measured stands in docs/performance.md; ways that did not pay are in docs/lab_log.md.
"""

import hashlib
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME

from kcfi.onnx import export_tower
from kcfi.processing import Describer, InputError

Speed = Literal["auto", "plain", "onnx"]

LOADED = 50  # pairs from which a file that is there pays
EXPORTED = 1000  # pairs from which making the file pays
TOLERANCE = 1e-3  # of a stage's features, relative to their norm; rounding is below 1e-5
KEPT = Path(HF_HOME) / "kcfi"  # a folder per model; may be deleted at any time
NEEDED = ("onnxruntime", "onnxscript")


class OnnxTower:
    """A `KCFIModel.stage_cache` that runs a tower in ONNX Runtime, on as many threads as torch.

    Args:
        file: of `kcfi.onnx.export_tower`.
    """

    def __init__(self, file: Path) -> None:
        import onnxruntime  # the extra `onnx`

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch wants these cores in between
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def __call__(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], None]:
        """Pixel values (B, 2, 3, S, S) -> stage features before and after; the tower's own output is not kept."""
        maps = self.session.run(None, {"pixel_values": pixel_values.numpy()})
        stages = [torch.from_numpy(values) for values in maps]
        half = len(stages) // 2
        return stages[:half], stages[half:], None


def speed_up(describer: Describer, speed: Speed, pairs: int) -> None:
    """Let a describer run its tower in the way that `speed` means for so many pairs; once fast, it stays so.

    Args:
        describer: whose model gets a `stage_cache`.
        speed: see the module.
        pairs: or tiles, that are to come.

    Raises:
        InputError: "onnx" is asked for and cannot be had: on a GPU, in another precision than fp32, without the extra
            `onnx`, or because the tower's results there are others.
    """
    model = describer.model
    if speed == "plain" or model.model.stage_cache is not None or (speed == "auto" and pairs < LOADED):
        return
    reason = obstacle(describer)
    if reason is None:
        file = KEPT / tower_key(model) / "tower.onnx"
        if speed == "auto" and pairs < EXPORTED and not file.exists():
            return
        try:
            tower = OnnxTower(keep_tower(model, file))
            reason = difference(model, tower)
        except (RuntimeError, torch.onnx.OnnxExporterError) as error:  # those of onnxruntime are RuntimeErrors
            reason = f"the tower cannot be run there ({type(error).__name__}: {str(error).splitlines()[0]})"
        if reason is None:
            model.model.stage_cache = tower
            return
    if speed == "onnx":
        raise InputError(f"--speed onnx: {reason}. Use --speed plain.")


def obstacle(describer: Describer) -> str | None:
    """Why a describer cannot run its tower in ONNX Runtime; None where nothing is in the way."""
    model = describer.model
    if model.device.type != "cpu":
        return f"it is for CPUs, and the model is on {model.device}"
    if model.dtype != torch.float32 or describer.autocast is not None:
        return f"it computes in fp32, and the model in {describer.autocast or model.dtype}"
    missing = [name for name in NEEDED if find_spec(name) is None]
    return f'{" and ".join(missing)} not installed: `pip install "kcfi[onnx]"`' if missing else None


def keep_tower(model: Any, file: Path) -> Path:
    """Export the tower of a model into a file of `KEPT` unless it is there; several processes do it once.

    Returns:
        The file.
    """
    if not file.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with FileLock(file.parent.with_suffix(".lock")):
            if not file.exists():
                with TemporaryDirectory(dir=KEPT) as folder:
                    export_tower(model, Path(folder) / "new" / file.name)
                    os.replace(Path(folder) / "new", file.parent)
    return file


def tower_key(model: Any) -> str:
    """A name for the tower of a model: other weights, settings or versions of what exports it have another one."""
    found = hashlib.sha256()
    config = model.config
    about = [config.vision_config.to_json_string(), config.image_size, config.vision_feature_layers]
    about += [version(name) for name in ("kcfi", "torch", "transformers", "timm", *NEEDED)]
    found.update(repr(about).encode())
    for name, weights in model.model.vision_tower.state_dict().items():
        found.update(name.encode())
        found.update(weights.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def difference(model: Any, tower: OnnxTower) -> str | None:
    """What is wrong with the features of a pair of noise in ONNX Runtime; None where they are those of torch."""
    side = model.config.image_size
    pixels = torch.randn(1, 2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (before + after for before, after, _ in (model.model.encode_dates(pixels), tower(pixels)))
    worst = max(float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))
    return None if worst < TOLERANCE else f"its features differ from torch's by {worst:.1e}"
