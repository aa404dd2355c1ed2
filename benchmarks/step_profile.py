"""Where a training step, or a folder of pairs, spends its time, part by part, on both sides of its benchmark.

```
python benchmarks/step_profile.py
python benchmarks/step_profile.py --case kcfi-dinov2s-smollm2-135m
python benchmarks/step_profile.py --folder
```

Prints the tables of docs/performance.md: each side of `train_step.py` or of `caption_folder.py`, warm, under PyTorch's
profiler. What runs backwards belongs to the part that ran forwards; the rest are files, losses, optimizer and Python.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from caption_folder import build_reader, write_pairs
from caption_folder import make_sides as make_folder_sides
from flops import matmul_peak
from measure import machine, warm_up
from torch.profiler import profile, record_function
from train_step import CASES, build
from train_step import make_sides as make_step_sides

from kcfi.training.parameters import cast_frozen_language_model

PARTS = {
    "vision tower": "model.vision_tower",
    "key change perceiver": "model.key_change_perceiver",
    "projector": "model.projector",
    "change detection head": "model.change_detection_head",
    "language model": "model.language_model",
    "output layer": "lm_head",
}
REST, STEP = "rest", "step"


def mark_parts(model: Any) -> None:
    """Give every part of the model a range of its name in the profile."""
    for part, path in PARTS.items():
        span, module = record_function(part), model.get_submodule(path)
        module.register_forward_pre_hook(lambda *_, span=span: span.__enter__() and None)
        module.register_forward_hook(lambda *_, span=span: span.__exit__(None, None, None))


def seconds_of(side: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """Seconds of a side by part and operator, without what these call in turn."""
    with profile() as profiler, record_function(STEP):
        side()
    seconds, part_of = Counter[tuple[str, str]](), {}  # part by the number that an operation shares with its backward
    for event in profiler.events():
        above, part, number = event, None, None
        while above is not None and part is None:
            part = above.name if above.name in PARTS else None
            if above.name.startswith("autograd::engine::evaluate_function"):
                number = above.sequence_nr
            above = above.cpu_parent
        if part is None:
            part = part_of.get(number, REST)
        else:
            part_of[event.sequence_nr] = part
        seconds[part, event.name] += event.self_cpu_time_total / 1e6
    return seconds


def table(seconds: dict[str, Counter[tuple[str, str]]], operations: dict[str, int], peak: float) -> str:
    """Markdown: time per part and side, what each side reaches of the peak, and the costliest operators.

    Args:
        seconds: of `seconds_of`, by side.
        operations: of a side, by its name.
        peak: operations per second of a matrix product.
    """
    lines = [f"| part | {' | '.join(seconds)} |", "|---" * (1 + len(seconds)) + "|"]
    for part in [*PARTS, REST]:
        times = {side: sum(value for (of, _), value in spent.items() if of == part) for side, spent in seconds.items()}
        cells = [f"{time:.2f} s, {time / seconds[side].total():.0%}" for side, time in times.items()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    cells = [
        f"{spent.total():.2f} s, {operations[side] / spent.total() / peak:.0%} of the matmul peak"
        for side, spent in seconds.items()
    ]
    lines.append(f"| **whole** | {' | '.join(cells)} |")
    for side, spent in seconds.items():
        top = [f"`{name}` in {part} {value / spent.total():.0%}" for (part, name), value in spent.most_common(6)]
        lines.append(f"\nCostliest operators, {side}: {', '.join(top)}.")
    return "\n".join(lines)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="kcfi-tiny", choices=list(CASES), help="model (%(default)s)")
    parser.add_argument("--folder", action="store_true", help="captions and masks of a folder, not a training step")
    parser.add_argument("--pairs", type=int, help="of a step, with five captions each (2), or of the folder (8)")
    options = parser.parse_args()
    pairs = options.pairs or (8 if options.folder else 2)
    bf16 = options.case != "kcfi-tiny" and not options.folder
    dtype = torch.bfloat16 if bf16 else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        if options.folder:
            model, processor = build_reader(options.case)
            write_pairs(Path(folder), pairs)
            sides: dict[str, Callable[[], Any]] = {**make_folder_sides(Path(folder), model, processor)}
        else:
            model, processor = build(options.case)
            cast_frozen_language_model(model, dtype)
            steps = make_step_sides(pairs, model, processor)
            sides = {name: lambda step=step: step(bf16) for name, step in steps.items()}
        mark_parts(model)
        _, operations = warm_up(sides)
        seconds = {name: seconds_of(side) for name, side in sides.items()}
    about, peak = machine(), matmul_peak(dtype)
    what = f"{pairs} pairs" if options.folder else f"{pairs} pairs x 5 captions"
    print(f"{options.case}, {'bf16' if bf16 else 'fp32'}, {what}; {about['threads']} threads")
    print(f"of {about['cpu']}, load {about['load']}, matmul peak {peak / 1e9:.0f} GFLOP/s:\n")
    print(table(seconds, operations, peak))


if __name__ == "__main__":
    main()
