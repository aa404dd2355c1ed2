"""All benchmarks that a CPU can pay for: `make bench`. Writes a file of `results/`, and tables of docs/performance.md.

The file is named after the time at which the run began, in UTC, and holds the machine, the commit and every row:
commit it, and `python benchmarks/compare.py` shows what moved since the run before. It is written after every part, so
that a run that is stopped keeps what it has; a part that fails is noted in it, and the others go on. The page gets the
tables of whole runs only.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measure import table
from tqdm import tqdm

from kcfi.files import write_whole
from kcfi.training.train import git_revision

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "performance.md"
BEGIN, END = "<!-- make bench writes what stands below -->\n", "<!-- up to here -->\n"
RESULTS = FOLDER / "results"
NAMES = ["start_up", "train_step", "caption_folder", "scene", "data_stream", "peers"]


def with_tables(page: str, reports: Sequence[Mapping[str, Any]]) -> str:
    """The page with the tables of these reports in place of what stands between its two marks."""
    machine = reports[0]["machine"]
    text = f"{machine['threads']} threads of {machine['cpu']}, torch {machine['torch']}, load {machine['load']}.\n"
    for report in reports:
        text += (
            f"\n`python benchmarks/{report['benchmark']}.py`, {report['seconds']:.0f} s:\n\n{table(report['rows'])}\n"
        )
    before, rest = page.split(BEGIN)
    return before + BEGIN + text + END + rest.split(END)[1]


def main() -> None:
    """Run one benchmark after the other; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    began = datetime.now(UTC).isoformat(timespec="seconds")
    file = options.output / f"{began[:19].replace(':', '')}.json"
    reports: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    run = {"began": began, "commit": git_revision(), "reports": reports, "failed": failed}
    for name in tqdm(NAMES, "benchmarks"):
        command = [sys.executable, str(FOLDER / f"{name}.py"), "--json"]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode or not done.stdout:
            last = (done.stderr.splitlines() or ["nothing was printed"])[-1]
            failed[name] = f"exit status {done.returncode}: {last}"  # of a part that is killed the line tells nothing
            tqdm.write(f"{done.stderr}{name}: failed after {seconds:.0f} s")
        else:
            reports.append({**json.loads(done.stdout.splitlines()[-1]), "seconds": seconds})
            tqdm.write(f"{name}: {seconds:.0f} s\n{table(reports[-1]['rows'])}")
        write_whole(file, json.dumps(run, indent=2) + "\n")
    print(f"results: {file}")
    if failed:
        sys.exit(f"{', '.join(failed)} failed: {PAGE.name} keeps the tables that it has.")
    write_whole(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), reports))


if __name__ == "__main__":
    main()
