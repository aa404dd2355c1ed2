"""`kcfi --help` against what any program pays that imports one name of transformers.

```
python benchmarks/start_up.py
```
"""

import subprocess
import sys

from measure import comparison, options_of, report, take_turns, warm_up

SIDES = {
    "plain": ["-c", "from transformers import AutoConfig"],
    "ours": ["-m", "kcfi_cli", "--help"],
}


def main() -> None:
    """Print starts per second of both sides."""
    options = options_of(__doc__).parse_args()
    sides = {
        name: lambda arguments=arguments: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        for name, arguments in SIDES.items()
    }
    warm_up(sides)
    row = comparison("kcfi --help", take_turns(sides, options.repeats), 1, "starts/s", 0.9)
    report("start_up", [row], options.json)


if __name__ == "__main__":
    main()
