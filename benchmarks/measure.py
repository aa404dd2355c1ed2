"""What the benchmarks share: sides that take turns in one process, operations and peak memory of each, the report."""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

SIDES = ("plain", "ours")
LOAD = os.getloadavg()[0]  # before the benchmark itself adds to it
PEAK = Path("/proc/self/clear_refs")  # taking a 5, it forgets the peak of memory so far; Linux alone has it


def options_of(description: str) -> argparse.ArgumentParser:
    """The parser of a benchmark: `--repeats` and `--json`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="timed rounds, after a warm-up (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


Row = dict[str, Any]


def operation_counter() -> FlopCounterMode:
    """PyTorch's counter of matrix products, attention and convolutions, with two formulas of ours.

    It lacks the attention of CPUs, and takes the weights' gradient of a grouped convolution for that of a dense one.
    """

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    def convolution_backward(gradient: Any, inputs: Any, weight: Any, *settings: Any, **_: Any) -> int:
        transposed, wanted = settings[4], settings[-1]  # gradients of inputs, weight, bias: a pass each, or none
        return int(conv_flop_count(inputs, weight, gradient, transposed=transposed)) * sum(wanted[:2])

    kernels = torch.ops.aten
    formulas = {
        kernels._scaled_dot_product_flash_attention_for_cpu: attention,
        kernels._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        kernels.convolution_backward: convolution_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def warm_up(sides: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, int]]:
    """Run each side once: what it returns, and how many operations it does."""
    results, operations = {}, {}
    for name, side in sides.items():
        with operation_counter() as counter:
            results[name] = side()
        operations[name] = int(counter.get_total_flops())
    return results, operations


class Rounds(NamedTuple):
    """What `take_turns` measures, by side."""

    seconds: dict[str, list[float]]  # of every round
    peaks: dict[str, float]  # most MiB of this process beyond the loaded model, in a further round; empty if unknown


def take_turns(sides: Mapping[str, Callable[[], Any]], repeats: int, loaded: float | None = None) -> Rounds:
    """Run the sides in turns, so that both meet the same disturbances.

    Args:
        sides: functions by name, warm.
        repeats: rounds.
        loaded: of `loaded_memory`; None where memory is not asked for.
    """
    rounds = Rounds({name: [] for name in sides}, {})
    for _ in range(repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            rounds.seconds[name].append(time.perf_counter() - started)
    if loaded is not None and PEAK.exists():
        for name, side in sides.items():
            loaded_memory()  # what the other side left is not this one's
            PEAK.write_text("5", encoding="ascii")
            side()
            rounds.peaks[name] = _status("VmHWM") - loaded
    return rounds


def comparison(
    case: str,
    rounds: Rounds,
    work: float,
    unit: str,
    bar: float | None,
    equal: str = "-",
    operations: Mapping[str, int] | None = None,
    peak: float = 0.0,
) -> Row:
    """A row of the report.

    Args:
        case: what both sides did.
        rounds: of `take_turns`, for the sides "plain" and "ours".
        work: units that a round does; the row has the medians as work per second, their ratio and its spread.
        unit: of the work, per second.
        bar: ratio that is wanted; None where the ratio only tells.
        equal: what was found equal, "-" where there is nothing to compare.
        operations: of `warm_up`; None for sides that are no model's work.
        peak: operations per second of a matrix product, of `flops.matmul_peak`.
    """
    plain, ours = (rounds.seconds[name] for name in SIDES)
    ratios = [slow / fast for slow, fast in zip(plain, ours, strict=True)]
    return {
        "case": case,
        "unit": unit,
        "plain": work / statistics.median(plain),
        "ours": work / statistics.median(ours),
        "ratio": statistics.median(plain) / statistics.median(ours),
        "spread": [min(ratios), max(ratios)],
        "bar": bar,
        "equal": equal,
        "peak_mib": [rounds.peaks[name] for name in SIDES] if rounds.peaks else [],
        "gflop": [operations[name] / 1e9 for name in SIDES] if operations else [],
        "of_peak": [operations[name] / statistics.median(rounds.seconds[name]) / peak for name in SIDES]
        if operations
        else [],
    }


def loaded_memory() -> float:
    """MiB that this process holds once all that is free is back with the system; 0 where Linux is not there to ask."""
    if not PEAK.exists():
        return 0.0
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def machine() -> dict[str, Any]:
    """Processor, memory, threads, versions, and how busy the machine was with other things at the start."""
    info, memory = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(int(memory.read_text(encoding="ascii").split()[1]) / 2**20) if memory.exists() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "load": round(LOAD, 1),
    }


def report(name: str, rows: list[Row], as_json: bool) -> None:
    """Print the rows, as a table or as one JSON object, with the machine."""
    about = machine()
    if as_json:
        print(json.dumps({"benchmark": name, "machine": about, "rows": rows}))
        return
    print(f"{name}: {about['threads']} of {about['cores']} cores of {about['cpu']}, load {about['load']}")
    print(table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    both = "plain / ours"
    heads = ["case", "plain", "ours", "ratio", "bar", f"GFLOP, {both}", f"of the matmul peak, {both}"]
    heads += [f"peak memory, {both}", "equal results"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        low, high = row["spread"]
        bar = "-" if row["bar"] is None else row["bar"]
        work = " / ".join(f"{value:,.0f}" for value in row["gflop"])
        share = " / ".join(f"{value:.0%}" for value in row["of_peak"])
        memory = " / ".join(f"{value:,.0f}" for value in row["peak_mib"])
        memory += " MiB" if memory else ""
        lines.append(
            f"| {row['case']} | {row['plain']:.3g} {row['unit']} | {row['ours']:.3g} | **{row['ratio']:.1f}** "
            f"({low:.1f} to {high:.1f}) | {bar} | {work} | {share} | {memory} | {row['equal']} |"
        )
    return "\n".join(lines)
