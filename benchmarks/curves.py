"""Draw what a training logged against its steps: one panel per quantity, one line per run.

```
python benchmarks/curves.py runs/real_towers --names caption_loss mask_loss eval_s_m --output curves.png
```

Needs `pip install "kcfi[bench]"`.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt


def main() -> None:
    """Read the trainer_state.json of each run and write a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that `kcfi train` wrote")
    parser.add_argument("--names", nargs="+", default=["caption_loss", "mask_loss"], help="quantities (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the picture")
    options = parser.parse_args()
    size = (4 * len(options.names), 3)
    figure, panels = plt.subplots(1, len(options.names), figsize=size, layout="constrained", squeeze=False)
    for run in options.runs:
        history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        for panel, name in zip(panels[0], options.names, strict=True):
            points = [(line["step"], line[name]) for line in history if name in line]
            if not points:
                parser.error(f"{run} logged no {name}")
            panel.plot(*zip(*points, strict=True), marker=".", label=run.name)
            panel.set(title=name, xlabel="step")
    if len(options.runs) > 1:
        panels[0][0].legend()
    figure.savefig(options.output, dpi=100)


if __name__ == "__main__":
    main()
