"""`kcfi caption` of a list by each engine: rows per second, peak memory, and whether the rows are the same.

```
python benchmarks/archives.py                               # 2,000 pairs of 64 px
python benchmarks/archives.py --model kcfi-tiny --rows 200  # pairs of 256 px
python benchmarks/archives.py --missing --rows 20000        # what each engine costs beside reading and the model
python benchmarks/archives.py --driver --rows 300000        # what the list and the table cost who starts the engine
```

The pairs are crops of the example pair. Without `--model` they are described by kcfi-tiny made to read 64 px: 16 times
less work for the model, and sentences of little worth. With `--missing` no image is there, so every row is an error.
Each process computes with one thread, so that the rows can be compared; the exception is named. Rows per second leave
the start out: they count from the first block that is written to the last. CPU seconds are those of all processes,
and say more than the clock where others work on the machine. Memory is what all processes hold at their peak,
divided fairly where they share it (PSS; Linux).
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from kcfi.archives.blocks import IMAGES, blocks, finished, read_rows, write_block, write_csv
from kcfi.archives.job import Job, Todo, prepare
from kcfi.archives.pairs import find_pairs
from kcfi.models import load

ROOT = Path(__file__).parents[1]
DATES = ("before", "after")
CROPS = 40  # pairs that differ; a longer list has them again and again
SAMPLE = 0.5  # s between two looks at the memory


@dataclass(frozen=True)
class Case:
    """An engine, its workers, and the threads of each."""

    engine: str
    workers: int
    threads: int = 1

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.engine}, {self.workers} x {self.threads} thread{'s' * (self.threads > 1)}"


CASES = (Case("local", 1), Case("local", 1, 2), Case("accelerate", 2), Case("ray", 1), Case("ray", 2))


def write_manifest(folder: Path, rows: int, side: int, missing: bool = False) -> Path:
    """Crops of the example pair, and a manifest of so many rows of them."""
    for date in DATES:
        (folder / date).mkdir()
        image = Image.open(ROOT / "kcfi" / "example" / f"{date}.png").convert("RGB")
        for number in range(0 if missing else CROPS):
            left, top = (37 * number % max(1, image.width - side), 53 * number % max(1, image.height - side))
            image.crop((left, top, left + side, top + side)).save(folder / date / f"{number}.png")
    columns: dict[str, list[str]] = {"name": [f"{number:06}" for number in range(rows)]}
    columns |= {date: [f"{date}/{number % CROPS}.png" for number in range(rows)] for date in DATES}
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def save_small(folder: Path, side: int = 64) -> str:
    """kcfi-tiny as a model that reads small images."""
    model, processor = load("kcfi-tiny")
    model.config.image_size = processor.tile_size = side
    processor.image_processor.size = processor.image_processor.crop_size = {"height": side, "width": side}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def caption(manifest: Path, output: Path, case: Case, model: str, block: int) -> dict[str, Any]:
    """Run `kcfi caption`, and measure it from outside."""
    options = ["--engine", case.engine, "--workers", str(case.workers), "--block", str(block), "--no_pictures"]
    command = [sys.executable, "-m", "kcfi_cli", "caption", str(manifest), "--model", model, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
    process = psutil.Popen([*command, *options], env=environment, stdout=subprocess.DEVNULL)
    peak, seconds = 0, {}
    while process.poll() is None:
        held = 0
        for one in [process, *process.children(recursive=True)]:
            try:
                held += one.memory_full_info().pss
                times = one.cpu_times()
                seconds[one.pid] = times.user + times.system
            except psutil.Error:  # it ended
                continue
        peak = max(peak, held)
        time.sleep(SAMPLE)
    if process.returncode not in (0, 1):  # 1: some rows are errors, which are counted
        sys.exit(f"{case.name} ended with exit code {process.returncode}")
    coverage = json.loads((output / "coverage.json").read_text(encoding="utf-8"))
    written = sorted(path.stat().st_mtime for path in blocks(output))
    return {
        "case": case.name,
        "rows": coverage["pairs"],
        "seconds": coverage["seconds"],
        "rows_per_s": (coverage["pairs"] - block) / (written[-1] - written[0]) if written[1:] else math.nan,
        "cpu_ms_per_row": 1000 * sum(seconds.values()) / coverage["pairs"],
        "peak_mib": peak / 2**20,
        "failed": coverage["failed"],
        "digest": digest(output),
    }


def driver_costs(folder: Path, rows: int) -> dict[str, float]:
    """CPU microseconds per row of what is done once for a list, and bytes per row of memory and disk."""
    names = [f"{number:08}" for number in range(rows)]
    columns = {"name": names, **{date: [f"/archive/{date}/{name}.tif" for name in names] for date in DATES}}
    pq.write_table(pa.table(columns), folder / "list.parquet")
    output, costs, held = folder / "driver", {}, psutil.Process().memory_info().rss
    marks = [time.process_time()]

    def note(name: str) -> None:
        marks.append(time.process_time())
        costs[name] = 1e6 * (marks[-1] - marks[-2]) / rows

    pairs = find_pairs(folder / "list.parquet")
    note("read the list")
    prepare(output, pairs, Job({"model": "-"}), "-", block=1000)
    note("plan")
    costs["bytes of memory"] = (psutil.Process().memory_info().rss - held) / rows
    todo, found = Todo(output), {"caption": "a road and many houses are built on the bareland .", "score": 0.5}
    for number in range(len(todo)):
        write_block(todo.path(number), pa.Table.from_pylist([row | found for row in todo.rows(number)], IMAGES))
    note("write blocks of 1,000")
    costs["bytes on the disk"] = sum(path.stat().st_size for path in blocks(output)) / rows
    finished(output)
    note("read what is done")
    write_csv(output, IMAGES)
    note("write captions.csv")
    return costs


def digest(output: Path) -> str:
    """A name for what all rows of a table say."""
    rows = sorted((row for path in blocks(output) for row in read_rows(path)), key=lambda row: row["name"])
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = ["| engine | rows | s, with the start | rows/s | CPU ms per row | peak MiB | failed | rows' digest |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        values = (
            f"{row['seconds']:.0f} | {row['rows_per_s']:.2f} | {row['cpu_ms_per_row']:.1f} | {row['peak_mib']:.0f}"
        )
        lines.append(f"| {row['case']} | {row['rows']} | {values} | {row['failed']} | `{row['digest']}` |")
    return "\n".join(lines)


def main() -> None:
    """Print a row per engine; the exit code is 1 if engines of one thread differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="of the list (%(default)s)")
    parser.add_argument("--block", type=int, default=16, help="rows per file (%(default)s)")
    parser.add_argument("--model", help="of pairs of 256 px (default: kcfi-tiny at 64 px)")
    parser.add_argument("--missing", action="store_true", help="name images that are not there")
    parser.add_argument("--driver", action="store_true", help="measure list and table alone, without an engine")
    parser.add_argument(
        "--cases", type=int, nargs="+", default=list(range(len(CASES))), help="by number, from 0 (all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        if options.driver:
            print(json.dumps({name: round(cost, 2) for name, cost in driver_costs(folder, options.rows).items()}))
            return
        model = options.model or save_small(folder / "small")
        manifest = write_manifest(folder, options.rows, 256 if options.model else 64, options.missing)
        for number in options.cases:
            rows.append(caption(manifest, folder / f"out{number}", CASES[number], model, options.block))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(json.dumps({"load": os.getloadavg(), "rows": rows}) if options.json else table(rows))
    same = {row["digest"] for row, number in zip(rows, options.cases, strict=True) if CASES[number].threads == 1}
    sys.exit(len(same) > 1)


if __name__ == "__main__":
    main()
