"""Time to quality on one fixed problem, with one clock: the records of docs/speedrun.md.

```
python -m kcfi.training.towers.vision_tower --output runs/tiny-vit --steps 600
kcfi data synthesize --pairs 4000 --seed 77 --shards --output runs/speedrun/drawn
python benchmarks/speedrun.py --recipe synthetic/fine_tuned_128px --steps 1000 --name row_0 --captions_per_pair 1
```

The problem: a model that the recipe joins from a tower that knows drawn dates (`runs/tiny-vit`) and the language
model of kcfi-tiny reads drawn pairs, of which the validation has 128 x 128 px. On the first 200 of `val` it has to
reach, all at the same time, a caption loss of 0.60, S_m* 85 and mask F1 75. All else is free: every recipe and every
field of one may follow. The clock is that of the training: models and first batches are not counted, nor are
evaluations, which come at `--evaluations` even steps and, after the first half of the steps, end a run that is there.
Every seed is a run of its own; a second call does what is missing.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from measure import machine
from time_to_quality import history
from transformers import TrainerCallback

from kcfi.training.arguments import parse_recipe
from kcfi.training.checkpoints import is_complete
from kcfi.training.train import train

TARGET = {"eval_caption_loss": 0.60, "eval_s_m": 85.0, "eval_mask_f1": 75.0}
PROBLEM = {"dataset": "runs/speedrun/drawn", "num_eval_pairs": 200, "text_model": "kcfi-tiny"}


def is_there(scores: dict[str, float]) -> bool:
    """Whether an evaluation meets the whole target: the loss from above, scores (in %) from below."""
    loss, *others = TARGET
    return scores[loss] <= TARGET[loss] and all(scores[name] >= TARGET[name] for name in others)


class AtTarget(TrainerCallback):
    """Ends a training at the target."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Ask for the end where the target is met."""
        control.should_training_stop |= is_there(metrics)


def run(folder: Path, options: argparse.Namespace, seed: int, more: list[str]) -> None:
    """Train with a seed until the target or the last step, unless it is done."""
    if is_complete(folder):
        return
    every = max(1, options.steps // options.evaluations)
    fields = PROBLEM | {"seed": seed, "output_dir": folder, "max_steps": options.steps}
    fields |= {"save_strategy": "no", "load_best_model_at_end": False}
    fields |= {"eval_strategy": "steps", "eval_steps": every, "logging_steps": every, "eval_delay": options.steps // 2}
    settings = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    train(parse_recipe(options.recipe, [*more, *settings]), callbacks=[AtTarget()])


def main() -> None:
    """Run every seed, write results.json, and print the row of the record list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="synthetic/fine_tuned_128px", help="file or packaged (%(default)s)")
    parser.add_argument("--name", required=True, help="of what is tried: a folder of --output")
    parser.add_argument("--steps", type=int, required=True, help="at which the schedule of the learning rate ends")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(%(default)s)")
    parser.add_argument("--evaluations", type=int, default=20, help="if all were made (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/speedrun"), help="folder (%(default)s)")
    options, more = parser.parse_known_args()

    rows = []
    for seed in options.seeds:
        folder = options.output / options.name / str(seed)
        run(folder, options, seed, more)
        lines = [line for line in history(folder) if "eval_caption_loss" in line]
        line = next((line for line in lines if is_there(line)), lines[-1])
        rows.append({"seed": seed, "there": is_there(line), "step": line["step"], "seconds": line["seconds"]})
        rows[-1] |= {name: line[name] for name in TARGET}
    about = {"machine": machine(), "recipe": options.recipe, "steps": options.steps, "fields": more, "seeds": rows}
    (options.output / options.name / "results.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    print("| what | seed | step | seconds | caption loss | S_m* | mask F1 | there |")
    print("|---" * 8 + "|")
    for row in rows:
        scores = " | ".join(f"{row[name]:.2f}" for name in TARGET)
        there = "yes" if row["there"] else "no"
        print(f"| {options.name} | {row['seed']} | {row['step']} | {row['seconds']:.0f} | {scores} | {there} |")
    if all(row["there"] for row in rows):
        print(f"{options.name}: {statistics.mean(row['seconds'] for row in rows):.0f} s")


if __name__ == "__main__":
    main()
