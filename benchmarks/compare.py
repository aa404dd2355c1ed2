"""What moved between two files of `make bench`.

```
python benchmarks/compare.py old.json new.json
```
"""

import argparse
import json
from pathlib import Path


def rows_of(file: Path) -> dict[tuple[str, str], dict[str, float]]:
    """(benchmark, case) -> row."""
    reports = json.loads(file.read_text(encoding="utf-8"))
    return {(report["benchmark"], row["case"]): row for report in reports for row in report["rows"]}


def main() -> None:
    """Print a line per case: ratio to the plain side and our own speed, old -> new."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    old, new = rows_of(options.old), rows_of(options.new)
    for key in {**old, **new}:
        name = ", ".join(key)
        if key not in old or key not in new:
            print(f"{name}: only in {options.old if key in old else options.new}")
            continue
        before, after = old[key], new[key]
        change = 100 * (after["ours"] / before["ours"] - 1)
        print(
            f"{name}: ratio {before['ratio']:.2f} -> {after['ratio']:.2f}, ours {before['ours']:.3g} -> "
            f"{after['ours']:.3g} {after['unit']} ({change:+.0f} %)"
        )


if __name__ == "__main__":
    main()
