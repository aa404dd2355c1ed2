"""What the benchmarks share: sides that take turns in one process, operations and peak memory of each, the report."""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

SIDES = ("plain", "ours")
LOAD = os.getloadavg()[0]  # before the benchmark itself adds to it


def options_of(description: str) -> argparse.ArgumentParser:
    """The parser of a benchmark: `--repeats`, `--json`, `--side` (for `peak_memory`)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="timed rounds, after a warm-up (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # this process measures the memory of one side
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


def take_turns(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side in every round; the sides alternate, so that both meet the same disturbances."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def comparison(
    case: str,
    seconds: Mapping[str, Sequence[float]],
    work: float,
    unit: str,
    bar: float,
    equal: str = "-",
    memory: Sequence[float] = (),
    operations: Mapping[str, int] | None = None,
    peak: float = 0.0,
) -> Row:
    """A row of the report.

    Args:
        case: what both sides did.
        seconds: of `take_turns`, for the sides "plain" and "ours".
        work: units that a round does; the row has the medians as work per second, their ratio and its spread.
        unit: of the work, per second.
        bar: ratio that is wanted.
        equal: what was found equal, "-" where there is nothing to compare.
        memory: of `peak_memory`.
        operations: of `warm_up`; None for sides that are no model's work.
        peak: operations per second of a matrix product, of `flops.matmul_peak`.
    """
    plain, ours = seconds["plain"], seconds["ours"]
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
        "peak_mib": list(memory),
        "gflop": [operations[name] / 1e9 for name in SIDES] if operations else [],
        "of_peak": [operations[name] / statistics.median(seconds[name]) / peak for name in SIDES]
        if operations
        else [],
    }


def print_peak(side: Callable[[], Any]) -> None:
    """Run a side once and print by how many MiB it raised the memory of this process, without children (Linux)."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of loading
    side()
    print(_status("VmHWM") - before)


def peak_memory(script: str, sides: Iterable[str], *arguments: str) -> list[float]:
    """What `print_peak` says of each side, in a process of its own; nothing where there is no /proc."""
    if not Path("/proc/self/clear_refs").exists():
        return []
    commands = [[sys.executable, script, "--side", side, *arguments] for side in sides]
    with ThreadPoolExecutor() as pool:  # together, as nothing is timed
        printed = list(pool.map(functools.partial(subprocess.check_output, text=True), commands))
    return [float(text.splitlines()[-1]) for text in printed]


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def machine() -> dict[str, Any]:
    """Processor, threads, versions, and how busy the machine was with other things at the start."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
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
        work = " / ".join(f"{value:,.0f}" for value in row["gflop"])
        share = " / ".join(f"{value:.0%}" for value in row["of_peak"])
        memory = " / ".join(f"{value:,.0f}" for value in row["peak_mib"])
        memory += " MiB" if memory else ""
        lines.append(
            f"| {row['case']} | {row['plain']:.3g} {row['unit']} | {row['ours']:.3g} | **{row['ratio']:.1f}** "
            f"({low:.1f} to {high:.1f}) | {row['bar']} | {work} | {share} | {memory} | {row['equal']} |"
        )
    return "\n".join(lines)
