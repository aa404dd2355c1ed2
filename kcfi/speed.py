"""`--speed`: what runs the vision tower on a CPU, where most of the time of a pair goes.

- "plain": torch, as in training.
- "exact": OpenVINO, in fp32: equal up to rounding, which is checked at the start.
- "bf16": OpenVINO, in bf16, on a CPU that multiplies it in hardware: other words and pixels here and there.
- "auto": "exact" where it can be had and pays for so many pairs, else "plain".

The tower is exported once per model, and kept in `KEPT`. A single pair never waits for it under "auto": whoever knows
that many pairs or tiles come tells `Describer.expect`. What each way costs stands in docs/performance.md.
"""

import hashlib
import os
import sys
from functools import cache
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

Speed = Literal["auto", "plain", "exact", "bf16"]

LOADED = 20  # pairs from which a tower that is kept pays
EXPORTED = 200  # pairs from which exporting it pays
TOLERANCES = {"f32": 1e-3, "bf16": 0.1}  # of stage features, relative to their norm; found: 1e-6 and 1e-2
KEPT = Path(HF_HOME) / "kcfi"  # a folder per tower; may be deleted at any time
NEEDED = ("openvino", "onnxscript")
FILE = "tower.onnx"


class FastTower:
    """A vision tower in OpenVINO, on as many threads as torch: `Describer.encode`.

    Args:
        file: of `kcfi.onnx.export_tower`.
        precision: that it computes in, "f32" or "bf16".
    """

    def __init__(self, file: Path, precision: str) -> None:
        self.precision = precision
        threads = torch.get_num_threads()
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        self.model: Any = openvino_core().compile_model(file, "CPU", settings)

    def __call__(self, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Pixel values (B, 2, 3, S, S) -> stage features before and after, as of `KCFIModel.encode_dates`."""
        outputs = self.model([pixel_values.contiguous().numpy()])
        maps = [torch.from_numpy(outputs[number]) for number in range(len(self.model.outputs))]
        return maps[: len(maps) // 2], maps[len(maps) // 2 :]


@cache
def openvino_core() -> Any:
    """OpenVINO's `Core`, one for the life of the process.

    Its CPU plugin gives the thread that loads it another stack for signals, and frees that stack when the last `Core`
    and model are gone, whichever thread that happens in: the next signal with a handler would then end the process.
    """
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)  # "not there": else OpenVINO tells its maker of every import
    import openvino  # the extra `fast`

    return openvino.Core()


def speed_up(describer: Describer, speed: Speed, pairs: int) -> None:
    """Let a describer run its tower in the way that `speed` means for so many pairs; once fast, it stays so.

    Args:
        describer: whose `encode` is set.
        speed: see the module.
        pairs: or tiles, that are to come.

    Raises:
        InputError: "exact" or "bf16" is asked for and cannot be had: on a GPU, of a model in another precision than
            fp32, without the extra `fast`, on a CPU without bf16, or because the features there are others.
    """
    if speed == "plain" or describer.encode is not None or (speed == "auto" and pairs < LOADED):
        return
    reason = obstacle(describer, speed)
    if reason is None:
        file = KEPT / tower_key(describer.model) / FILE
        if speed == "auto" and pairs < EXPORTED and not file.exists():
            return
        try:
            keep_tower(describer.model, file)
            tower = FastTower(file, "bf16" if speed == "bf16" else "f32")
            reason = difference(describer.model, tower)
        except (OSError, RuntimeError, torch.onnx.errors.OnnxExporterError) as error:  # OSError: a full or locked disk
            reason = f"the vision tower does not run in OpenVINO: {str(error).splitlines()[0]}"
        if reason is None:
            describer.encode = tower
            return
    if speed != "auto":
        raise InputError(f"--speed {speed}: {reason}. Use --speed plain.")


def obstacle(describer: Describer, speed: Speed) -> str | None:
    """Why a describer cannot run its tower in OpenVINO; None where nothing is in the way."""
    model = describer.model
    if model.device.type != "cpu":
        return f"it is for CPUs, and the model is on {model.device}"
    if model.dtype != torch.float32 or describer.autocast is not None:
        return f"it takes a model in fp32, and this one is in {describer.autocast or model.dtype}"
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        return f'{" and ".join(missing)} not installed: `pip install "kcfi[fast]"`'
    if speed == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        return "this CPU does not multiply bf16 in hardware (AVX512-BF16)"
    return None


def keep_tower(model: Any, file: Path) -> None:
    """Export the tower of a model into a folder of `KEPT` unless it is there; of several processes one does it."""
    if file.exists():
        return
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(file.parent.with_suffix(".lock")), TemporaryDirectory(dir=KEPT) as new:
        if not file.exists():
            export_tower(model, Path(new) / "tower" / FILE)
            os.replace(Path(new) / "tower", file.parent)  # whole, or not there


def tower_key(model: Any) -> str:
    """A name for the tower of a model: other weights, settings or versions of what exports it have another one."""
    found = hashlib.sha256(model.config.to_json_string().encode())
    found.update(repr([version(name) for name in ("kcfi", "torch", "transformers", "timm", *NEEDED)]).encode())
    for name, weights in model.model.vision_tower.state_dict().items():
        found.update(name.encode())
        found.update(weights.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def difference(model: Any, tower: FastTower) -> str | None:
    """What is wrong with the features of a pair of noise in OpenVINO; None where they are those of torch."""
    side = model.config.image_size
    pixels = torch.randn(1, 2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (before, after, _), found = model.model.encode_dates(pixels), tower(pixels)
    pairs = zip([*found[0], *found[1]], [*before, *after], strict=True)
    worst = max(float((one - other).norm() / other.norm()) for one, other in pairs)
    return None if worst < TOLERANCES[tower.precision] else f"its features differ from torch's by {worst:.1e}"
