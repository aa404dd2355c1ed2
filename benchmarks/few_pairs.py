"""What a number of real pairs brings: the table and the curves of docs/real_pairs.md, of models that were judged.

```
kcfi train levir_few/pairs_152 --seed 1 --output_dir runs/levir_few/all_152-1
python benchmarks/real_levir.py PAIRS --split test --model runs/levir_few/all_152-1 --output judged/all_152-1
python benchmarks/real_pairs.py WHU --scale 0.5 --model runs/levir_few/all_152-1 > judged/all_152-1/whu.txt
python benchmarks/few_pairs.py judged --output docs/few_pairs.png
```

Reads every folder KIND_PAIRS-SEED below `judged`; PAIRS is 0 for a model as it comes (base_0-0), where all curves
begin. Prints mean and standard deviation over the seeds; draws one panel per score, one line per kind, one dot per
seed. Needs `pip install "kcfi[bench]"`.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = re.compile(r"(?P<kind>\w+)_(?P<pairs>\d+)-(?P<seed>\d+)")
SCORES = ("S_m*", "told apart", "building F1", "another city: building F1")


def read_scores(folder: Path) -> dict[str, float]:
    """The scores of a judged model, in %; without another city where whu.txt is missing."""
    lines = json.loads((folder / "real_levir.json").read_text(encoding="utf-8"))
    model = [line for line in lines if "model" in (line.get("captions"), line.get("building"))]
    scores = {"told apart": next(line["told apart"] for line in model if "told apart" in line)}
    scores["S_m*"] = next(line["s_m"] for line in model if line.get("of") == "all")
    scores["building F1"] = next(line["f1"] for line in model if "building" in line)
    if (elsewhere := folder / "whu.txt").is_file():
        texts = [text for text in elsewhere.read_text(encoding="utf-8").splitlines() if text.startswith("{")]
        of_model = [line for line in map(json.loads, texts) if line.get("mask") == "model"]
        scores["another city: building F1"] = of_model[-1]["f1"]
    return {name: scores[name] for name in SCORES if name in scores}


def cell(values: list[float]) -> str:
    """Mean and, of several seeds, standard deviation."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def main() -> None:
    """Print the table and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judged", type=Path, help="folder of folders that real_levir.py wrote, KIND_PAIRS-SEED")
    parser.add_argument("--output", type=Path, required=True, help="the picture")
    options = parser.parse_args()
    runs = defaultdict[tuple[str, int], list[dict[str, float]]](list)
    for folder in sorted(options.judged.iterdir()):
        if (match := FOLDER.fullmatch(folder.name)) and (folder / "real_levir.json").is_file():
            try:
                runs[match["kind"], int(match["pairs"])].append(read_scores(folder))
            except (ValueError, LookupError, StopIteration) as error:
                parser.error(
                    f"{folder}: real_levir.json (made without --no-meteor) or whu.txt is cut off or lacks a score "
                    f"({error!r}): judge this model anew."
                )
    if not runs:
        parser.error(f"{options.judged} has no folder KIND_PAIRS-SEED with a real_levir.json: see --help.")

    print(f"| what learns | pairs | seeds | {' | '.join(SCORES)} |")
    print("|---" * (3 + len(SCORES)) + "|")
    values = {
        key: {name: [run[name] for run in found if name in run] for name in SCORES} for key, found in runs.items()
    }
    for (kind, pairs), scores in sorted(values.items(), key=lambda item: (item[0][1], item[0][0])):
        cells = [cell(scores[name]) if scores[name] else "-" for name in SCORES]
        print(f"| {kind} | {pairs} | {len(runs[kind, pairs])} | {' | '.join(cells)} |")

    start = [key for key in values if key[1] == 0]
    kinds = sorted({kind for kind, pairs in values if pairs})
    figure, panels = plt.subplots(1, len(SCORES), figsize=(4 * len(SCORES), 3), layout="constrained")
    for panel, name in zip(panels, SCORES, strict=True):
        for color, kind in enumerate(kinds):
            keys = start + sorted(key for key in values if key[0] == kind and key[1])
            keys = [key for key in keys if values[key][name]]
            means = [statistics.mean(values[key][name]) for key in keys]
            panel.plot([key[1] for key in keys], means, label=kind, color=f"C{color}")
            dots = [(key[1], value) for key in keys for value in values[key][name]]
            panel.plot(*zip(*dots, strict=True), ".", color=f"C{color}")
        panel.set(title=name, xlabel="real pairs")
        panel.set_xscale("symlog", linthresh=38)
        ticks = sorted({pairs for _, pairs in values})
        panel.set_xticks(ticks, [str(pairs) for pairs in ticks])
    panels[0].legend()
    figure.savefig(options.output, dpi=100)


if __name__ == "__main__":
    main()
