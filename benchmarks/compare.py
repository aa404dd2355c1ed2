"""What moved between two runs of `make bench`.

```
python benchmarks/compare.py                       # the last run of benchmarks/results, against the one before
python benchmarks/compare.py old.json new.json
```
"""

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read_run(file: Path) -> dict[str, Any]:
    """A file of `make bench`, which has one part at least.

    Raises:
        SystemExit: it is another file, damaged, or not there.
    """
    try:
        run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        heading(file, run)
        if all(row["ours"] and row["ratio"] and row["unit"] for row in rows_of(run).values()):
            return run
    except OSError as error:
        raise SystemExit(f"{file}: not readable ({error.strerror}).") from error
    except (ValueError, LookupError, TypeError, AttributeError):
        pass  # no JSON, or other JSON
    raise SystemExit(f"{file}: no results of `make bench` as it is now, or of no part: name a newer file.")


def rows_of(run: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(benchmark, case) -> row."""
    return {(report["benchmark"], row["case"]): row for report in run["reports"] for row in report["rows"]}


def heading(file: Path, run: dict[str, Any]) -> str:
    """A line that says where and when a run was."""
    machine = run["reports"][0]["machine"]
    return (
        f"{file.name}: {run['began']}, commit {run['commit']}, {machine['threads']} of {machine['cores']} cores of "
        f"{machine['cpu']}, torch {machine['torch']}, load {machine['load']}"
    )


def main() -> None:
    """Print a line per run, and one per case: ratio to the plain side and our own speed, old -> new."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="two files (the two newest of benchmarks/results)")
    files = parser.parse_args().files or sorted(RESULTS.glob("*.json"))[-2:]
    if len(files) != 2:
        parser.error(
            f"two runs are compared, and here are {len(files)}: name two files, or let `make bench` run twice."
        )
    runs = [read_run(file) for file in files]
    for file, run in zip(files, runs, strict=True):
        print(heading(file, run))
    old, new = (rows_of(run) for run in runs)
    for key in {**old, **new}:
        name = ", ".join(key)
        if key not in old or key not in new:
            print(f"{name}: only in {files[0 if key in old else 1]}")
            continue
        before, after = old[key], new[key]
        change = 100 * (after["ours"] / before["ours"] - 1)
        print(
            f"{name}: ratio {before['ratio']:.2f} -> {after['ratio']:.2f}, ours {before['ours']:.3g} -> "
            f"{after['ours']:.3g} {after['unit']} ({change:+.0f} %)"
        )


if __name__ == "__main__":
    main()
