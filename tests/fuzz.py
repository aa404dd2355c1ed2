"""Thousands of damaged files for every reader: none may crash or hang it, or take more memory than valid ones.

```
make fuzz                                            # all readers, about half an hour on one core
python tests/fuzz.py --readers png config            # some
python tests/fuzz.py --share 0.1                     # the first tenth of the inputs of each
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
import math
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
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tests.fuzz_readers import READERS, Seeds  # noqa: E402

SECONDS = 10  # of the processor, so that a busy machine makes no hang
START = 3600  # s, in which the first answer must come: imports and valid files, on a machine that does much else
PATIENCE = 300  # s without an answer, after which a process that waits or that no signal interrupts is killed
ADDRESS_SPACE = 4 * 2**30  # bytes beyond those of the process with its valid files
MIB = 100  # that an input may take beyond the most that a valid one takes

REFUSED_SEEDS = ("png", "jpeg", "tiff", "geotiff")  # some are of bands and bits that must be asked for

Task = tuple[str, int]  # reader and number of an input


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


def work(tasks: list[Task]) -> None:
    """Try inputs, reader after reader; a line of JSON for each. The first of a reader tells of its valid files."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever libraries print
    for reader, group in groupby(tasks, key=lambda task: task[0]):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as inputs:
            seeds = READERS[reader][1](Path(folder))
            most = 0.0
            for again in (False, True):  # the second time nothing is imported
                for name, content in seeds.files.items():
                    verdict, mib, _ = _try(seeds, Path(inputs), name, content)
                    if verdict not in ("read", "InputError" if reader in REFUSED_SEEDS else ""):
                        raise SystemExit(f"{reader}: the valid {name} gave {verdict}")
                    most = max(most, mib) if again else 0.0
            print(json.dumps({"reader": reader, "valid": most}), file=answers)
            size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, resource.RLIM_INFINITY))
            for _, number in group:
                verdict, mib, seconds = _try(seeds, Path(inputs), *changed_file(reader, seeds, number))
                if mib > most + MIB and not verdict.startswith("crash"):
                    verdict = f"memory: {mib:.0f} MiB, then {verdict}"
                said = {"reader": reader, "number": number, "verdict": verdict, "mib": mib, "seconds": seconds}
                print(json.dumps(said), file=answers)


def _try(seeds: Seeds, folder: Path, name: str, content: bytes) -> tuple[str, float, float]:
    path = folder / name
    path.write_bytes(content)
    try:
        return judge_with_memory(seeds, path)
    finally:
        path.unlink()


def supervise(tasks: list[Task]) -> Iterator[dict[str, Any]]:
    """The answers of `work` to all inputs; a process that dies or hangs is replaced by one that goes on behind it."""
    while tasks:
        with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile() as errors:
            json.dump(tasks, given)
            given.seek(0)
            command = [sys.executable, __file__, "--work"]
            process = subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT)
            started = False
            for line in _lines(process):
                started = True
                if "number" in line:
                    tasks = tasks[1:]
                yield line
            ended = process.poll() is not None
            process.kill()
            process.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace")[-2000:]
        if tasks and (not started or process.returncode > 0):
            raise SystemExit(f"{tasks[0][0]} could not be tried: {said}")
        if tasks:
            verdict = f"crash: the process ended ({process.returncode})" if ended else "hang"
            (reader, number), tasks = tasks[0], tasks[1:]
            yield {"reader": reader, "number": number, "verdict": verdict, "mib": 0.0, "seconds": 0.0}


def _lines(process: Any) -> Iterator[dict[str, Any]]:
    """Lines of JSON that a process prints, until it ends or is silent for `START` s and then `PATIENCE` s."""
    text, pipe, patience = b"", process.stdout.fileno(), START
    while select.select([pipe], [], [], patience)[0]:
        more = os.read(pipe, 2**16)
        if not more:
            process.wait()
            return
        *lines, text = (text + more).split(b"\n")
        yield from map(json.loads, lines)
        patience = PATIENCE


class Row:
    """What was counted of one reader."""

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.found: dict[str, int] = {}  # the first input of each kind of mistake
        self.valid = self.most = self.slowest = 0.0

    def add(self, answer: dict[str, Any]) -> None:
        """Count a line of `supervise`."""
        self.valid = max(self.valid, answer.get("valid", 0.0))
        if "number" not in answer:
            return
        verdict = answer["verdict"]
        self.verdicts[verdict.partition(":")[0]] += 1
        self.most, self.slowest = max(self.most, answer["mib"]), max(self.slowest, answer["seconds"])
        kind = verdict.partition(" (")[0]  # the class and the place
        if (":" in verdict or verdict == "hang") and kind not in self.found:
            self.found[kind] = answer["number"]
            print(f"  {answer['reader']} {answer['number']}: {verdict}", flush=True)

    def cells(self, reader: str) -> dict[str, Any]:
        """The row of the table."""
        count = self.verdicts
        proper = [
            f"{number:,} {kind}" for kind, number in count.most_common() if kind not in ("crash", "hang", "memory")
        ]
        return {
            "reader": reader,
            "inputs": count.total(),
            "answers": ", ".join(proper),
            "crashes": count["crash"],
            "hangs": count["hang"],
            f"over {MIB} MiB": count["memory"],
            "MiB": f"{self.most:.0f} (valid: {self.valid:.0f})",
            "slowest": f"{self.slowest:.1f} s",
        }


def keep_inputs(reader: str, numbers: Iterable[int], folder: Path) -> None:
    """Write inputs into a folder, by reader."""
    with tempfile.TemporaryDirectory() as own:
        seeds = READERS[reader][1](Path(own))
    (folder / reader).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        name, content = changed_file(reader, seeds, number)
        (folder / reader / f"{number}-{name}").write_bytes(content)


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
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs of each reader (%(default)s)")
    parser.add_argument("--inputs", nargs="+", type=int, help="numbers (default: all of a reader)")
    parser.add_argument("--keep", type=Path, help="folder for inputs that found something")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # tasks come on standard input
    options = parser.parse_args()
    if options.work:
        work(json.load(sys.stdin))
        return 0
    counts = {reader: math.ceil(options.share * READERS[reader][0]) for reader in options.readers}
    tasks = [(reader, number) for reader in counts for number in options.inputs or range(counts[reader])]
    rows: dict[str, Row] = {}
    for reader, answers in groupby(supervise(tasks), key=lambda answer: answer["reader"]):
        rows[reader] = Row()
        for answer in answers:
            rows[reader].add(answer)
        print(table([rows[reader].cells(reader)]).splitlines()[2], flush=True)
    for reader, row in rows.items():
        if options.keep and row.found:
            keep_inputs(reader, options.inputs or row.found.values(), options.keep)
    print(table([row.cells(reader) for reader, row in rows.items()]))
    return int(any(row.found for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
