"""Thousands of damaged files for every reader: none may crash or hang it, or take more memory than valid ones.

```
make fuzz                                            # all readers, about half an hour on one core
python tests/fuzz.py --readers png config            # some
python tests/fuzz.py --readers png --inputs 37 --keep found   # one input again, written into a folder
```

An input is a pure function of reader and number, so any can be made again. Each reader runs in a process of its own,
which a signal interrupts after `SECONDS` of work, and which is ended from outside if that does not help. A reader may
refuse an input with `InputError`, or with an `OSError` that names a file. Anything else is a crash. Inputs that have
found a mistake stay in `tests/fuzz_inputs/`, which `tests/test_fuzz.py` reads in every run of the tests.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tests.fuzz_readers import READERS, Seeds  # noqa: E402

SECONDS = 10  # of the processor, so that a busy machine makes no hang
PATIENCE = 90  # s, after which a process that waits, or that no signal interrupts, is killed
START = 180  # s for the imports and the valid files
ADDRESS_SPACE = 4 * 2**30  # bytes beyond those of the process with its valid files
MIB = 100  # that an input may take beyond the most that a valid one takes


def changed_file(reader: str, seeds: Seeds, number: int) -> tuple[str, bytes]:
    """Name and content of an input."""
    chance = Random(f"{reader} {number}")
    name = chance.choice(sorted(seeds.files))
    return name, seeds.mutate(seeds.files[name], chance)


class Hang(BaseException):
    """The time of an input is over; no `except Exception` swallows it."""


def _over(signal: int, frame: Any) -> None:
    raise Hang


def judge(seeds: Seeds, path: Path) -> str:
    """What a reader made of a file: "read", the class of a proper refusal, "hang", or "crash: " and where."""
    from kcfi.processing import InputError

    signal.signal(signal.SIGPROF, _over)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w", encoding="utf-8")):
            seeds.read(path)
    except InputError as error:
        return "InputError" if str(error).strip() else "crash: an InputError without a word"
    except OSError as error:
        if error.filename or type(error) is FileNotFoundError:
            return type(error).__name__
        return f"crash: {_place(error)}"
    except Hang:
        return "hang"
    except BaseException as error:
        return f"crash: {_place(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "read"


def _place(error: BaseException) -> str:
    """The class of an error and the last line of this project on its way."""
    trace, place = error.__traceback__, ""
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith(str(ROOT)) and "/tests/" not in file:
            place = f"{file.removeprefix(str(ROOT)).lstrip('/')}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place} ({' '.join(str(error).split())[:150]})"


def _memory(key: str) -> float:
    """VmHWM (the most since it was set back) or VmRSS of this process in MiB."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(found[1]) / 1024 if found else 0.0


def judge_with_memory(seeds: Seeds, path: Path) -> tuple[str, float, float]:
    """`judge`, and the MiB and the seconds that it took."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM back
    before, start = _memory("VmRSS"), time.process_time()
    verdict = judge(seeds, path)
    return verdict, _memory("VmHWM") - before, time.process_time() - start


def work(reader: str, numbers: list[int]) -> None:
    """Try inputs of one reader; a line of JSON for each. The first line is of the valid files."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever libraries print
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as inputs:
        seeds = READERS[reader][1](Path(folder))
        most = 0.0
        for again in (False, True):  # the second time nothing is imported
            for name, content in seeds.files.items():
                verdict, mib, _ = _try(seeds, Path(inputs), name, content)
                if not (verdict == "read" or reader in ("png", "jpeg", "tiff", "geotiff")):
                    raise SystemExit(f"{reader}: the valid {name} gave {verdict}")
                most = max(most, mib) if again else 0.0
        size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, resource.RLIM_INFINITY))
        print(json.dumps({"valid": most}), file=answers)
        for number in numbers:
            verdict, mib, seconds = _try(seeds, Path(inputs), *changed_file(reader, seeds, number))
            if mib > most + MIB and not verdict.startswith("crash"):
                verdict = f"memory: {mib:.0f} MiB, then {verdict}"
            print(json.dumps({"number": number, "verdict": verdict, "mib": mib, "seconds": seconds}), file=answers)


def _try(seeds: Seeds, folder: Path, name: str, content: bytes) -> tuple[str, float, float]:
    path = folder / name
    path.write_bytes(content)
    try:
        return judge_with_memory(seeds, path)
    finally:
        path.unlink()


def supervise(reader: str, numbers: list[int]) -> Iterator[dict[str, Any]]:
    """The answers of `work` to all inputs; a process that dies or hangs is replaced by one that goes on behind it."""
    left = list(numbers)
    while left:
        command = [sys.executable, __file__, "--work", reader, "--inputs", *map(str, left)]
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT)
            started, ended = False, False
            for line in _lines(process, START):
                started = True
                if "number" in line:
                    left.remove(line["number"])
                yield line
            ended = process.poll() is not None
            process.kill()
            process.wait()
            if left and not started:
                errors.seek(0)
                raise SystemExit(f"{reader} did not start:\n{errors.read().decode(errors='replace')}")
        if left:
            verdict = f"crash: the process ended ({process.returncode})" if ended else "hang"
            yield {"number": left.pop(0), "verdict": verdict, "mib": 0.0, "seconds": 0.0}


def _lines(process: Any, patience: float) -> Iterator[dict[str, Any]]:
    """Lines of JSON that a process prints, until it ends or is silent too long: `PATIENCE` s behind the first."""
    text, pipe = b"", process.stdout.fileno()
    while select.select([pipe], [], [], patience)[0]:
        more = os.read(pipe, 2**16)
        if not more:
            process.wait()
            return
        *lines, text = (text + more).split(b"\n")
        yield from map(json.loads, lines)
        patience = PATIENCE


def run(reader: str, numbers: list[int], keep: Path | None) -> dict[str, Any]:
    """All inputs of a reader -> its row of the table; what is no proper answer is printed and kept."""
    verdicts: Counter[str] = Counter()
    valid = most = slowest = 0.0
    found: dict[str, int] = {}
    for answer in supervise(reader, numbers):
        if "valid" in answer:
            valid = answer["valid"]
            continue
        verdict = answer["verdict"]
        verdicts[verdict.partition(":")[0]] += 1
        most, slowest = max(most, answer["mib"]), max(slowest, answer["seconds"])
        if ":" in verdict or verdict == "hang":
            kind = verdict.partition(" (")[0]  # one of each class and place
            if kind not in found:
                found[kind] = answer["number"]
                print(f"  {reader} {answer['number']}: {verdict}", flush=True)
    if keep is not None:
        with tempfile.TemporaryDirectory() as folder:
            seeds = READERS[reader][1](Path(folder))
        (keep / reader).mkdir(parents=True, exist_ok=True)
        for number in found.values() if len(numbers) > 1 else numbers:
            name, content = changed_file(reader, seeds, number)
            (keep / reader / f"{number}-{name}").write_bytes(content)
    bad = ("crash", "hang", "memory")
    answers = ", ".join(f"{count:,} {kind}" for kind, count in verdicts.most_common() if kind not in bad)
    row = {"reader": reader, "inputs": verdicts.total(), "answers": answers}
    row |= {"crashes": verdicts["crash"], "hangs": verdicts["hang"], f"over {MIB} MiB": verdicts["memory"]}
    return row | {"MiB": f"{most:.0f} (valid: {valid:.0f})", "slowest": f"{slowest:.1f} s"}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, with their sum."""
    total = {
        "reader": "all",
        **{key: sum(row[key] for row in rows) for key, value in rows[0].items() if type(value) is int},
    }
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([row.get(key, "") for key in rows[0]] for row in [*rows, total])]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> int:
    """Run some readers or all; 1 if there was a crash, a hang or too much memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS), metavar="READER")
    parser.add_argument("--inputs", nargs="+", type=int, help="numbers (default: all of a reader)")
    parser.add_argument("--keep", type=Path, help="folder for inputs that found something")
    parser.add_argument("--work", choices=READERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.inputs)
        return 0
    rows = []
    for reader in options.readers:
        rows.append(run(reader, options.inputs or list(range(READERS[reader][0])), options.keep))
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    return int(any(row["crashes"] or row["hangs"] or row[f"over {MIB} MiB"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
