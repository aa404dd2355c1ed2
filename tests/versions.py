"""The fast tests at both ends of the declared versions, on every Python that is there: `make test-versions`.

```
make test-versions                                           # all of them: about a quarter of an hour each
make test-versions PYTHONS=python3.12 ENDS=floors            # one of them
```

"floors" is the lowest version of every package that setup.cfg allows, "newest" what pip takes today. Each environment
takes 7 GB and is removed when its tests have ended; the log of a run stays in `.versions/`.
"""

import argparse
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("python3.11", "python3.12", "python3.13")
ENDS = ("floors", "newest")
SHOWN = ("transformers", "torch", "datasets", "accelerate", "peft", "timm", "numpy")  # columns of the table
KINDS = ("passed", "failed", "skipped")
COUNT = re.compile(r"(\d+) (passed|failed|skipped|error)")


def floors(setup: Path) -> list[str]:
    """What `>=` says in every requirement of a setup.cfg, as exact versions: "torch==2.6"."""
    config = configparser.ConfigParser()
    config.read(setup, encoding="utf-8")
    lines = config["options"]["install_requires"].splitlines()
    for extra in config["options.extras_require"].values():
        lines += extra.splitlines()
    found = (re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", line) for line in lines)
    return sorted({f"{match[1]}=={match[2]}" for match in found if match})


def counts_of(log: str) -> str | None:
    """ "1700 passed, 0 failed, 3 skipped" from the closing line of pytest; None without one, or with errors in it."""
    closing = [line for line in log.splitlines() if re.search(r"\d+ passed.* in [\d.]+s", line)]
    counts = {word: number for number, word in COUNT.findall(closing[-1])} if closing else {"error": "1"}
    return None if "error" in counts else ", ".join(f"{counts.get(word, 0)} {word}" for word in KINDS)


def run_end(python: str, end: str, folder: Path) -> dict[str, str]:
    """Install one end and run the fast tests there.

    Args:
        python: Interpreter, "python3.12" or a path.
        end: "floors" or "newest".
        folder: For the environment and the log.

    Returns:
        A row of the table: `python`, `end`, the versions of `SHOWN`, and the counts of pytest or what went wrong.
    """
    name = f"{Path(python).name}-{end}"
    environment, log = folder / name, folder / f"{name}.log"
    shutil.rmtree(environment, ignore_errors=True)
    pins = folder / f"{name}.txt"
    pins.write_text("\n".join(floors(ROOT / "setup.cfg") if end == "floors" else []) + "\n", encoding="utf-8")
    inside = str(environment / ("Scripts" if os.name == "nt" else "bin") / "python")
    pip = [inside, "-m", "pip", "install", "--quiet", "-c", str(pins)]
    steps = [
        [python, "-m", "venv", str(environment)],
        [*pip, "torch", "torchvision"],  # first, see the Makefile
        [*pip, "-e", ".[dev]"],
        [inside, "-m", "pytest", "-q", "-m", "not slow", "-n", "auto", "-p", "no:cacheprovider"],
    ]
    row = {"python": Path(python).name, "end": end}
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(inside).parent}{os.pathsep}{os.environ['PATH']}"}
    with log.open("w", encoding="utf-8") as file:
        for step in steps:
            file.flush()
            done = subprocess.run(step, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=settings, check=False)
            if done.returncode and step is not steps[-1]:
                return {**row, "result": f"not installed, see {log}"}
    listed = subprocess.run(
        [inside, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    versions = {package["name"]: package["version"] for package in json.loads(listed.stdout)}
    result = counts_of(log.read_text(encoding="utf-8"))
    if result is None or (done.returncode == 0) != (" 0 failed" in result):
        result = f"broken, see {log}"
    shutil.rmtree(environment)
    return row | {package: versions.get(package, "-") for package in SHOWN} | {"result": result}


def table(rows: Sequence[dict[str, str]]) -> str:
    """The rows as Markdown."""
    columns = ("python", "end", *SHOWN, "result")
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Print a table; the exit code is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, help="interpreters; those not installed are left out")
    parser.add_argument("--ends", nargs="+", default=ENDS, choices=ENDS)
    options = parser.parse_args()
    folder = ROOT / ".versions"
    folder.mkdir(exist_ok=True)
    rows = []
    for python in options.pythons:
        try:
            subprocess.run([python, "--version"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            print(f"{python} is not installed", file=sys.stderr)
            continue
        for end in options.ends:
            rows.append(run_end(python, end, folder))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))
    return int(not rows or any(" 0 failed" not in row["result"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
