"""Time to quality on one fixed problem, with one clock: the records of docs/speedrun.md.

```
python -m kcfi.training.towers.vision_tower --output runs/tiny-vit --steps 600
kcfi data synthesize --pairs 4000 --seed 77 --shards --output runs/speedrun/drawn
python benchmarks/speedrun.py --recipe synthetic/fine_tuned_128px --steps 1000 --name row_0 --captions_per_pair 1
```

The problem: a model that is joined from a tower that knows drawn dates (`runs/tiny-vit`) and the language model of
kcfi-tiny learns from the `train` split of the drawn pairs. On the first 200 of `val` it has to reach, all at the same
time, a caption loss of 0.90, S_m* 80 and mask F1 70 (roads and buildings, at the size of the images). All else is
free: every recipe, and every field that is neither of the problem nor of the clock, may follow. The clock counts
training alone, with its first batch; not the loading of models, nor evaluations. These come in the second half of the
steps (`--evaluations` would be those of both halves), and end a run that is there. Every seed is a run of its own; a
second call does what is missing, and begins a seed that was stopped anew. In one process; needs Java and
`pip install "kcfi[bench]"`.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from measure import machine
from time_to_quality import history
from transformers import TrainerCallback

from kcfi.processing import InputError
from kcfi.training.arguments import parse_recipe
from kcfi.training.checkpoints import is_complete
from kcfi.training.train import check_same_recipe, train

MACHINE = "machine.json"  # in the folder of a run: where it ran
TARGET = {"eval_caption_loss": 0.90, "eval_s_m": 80.0, "eval_mask_f1": 70.0}
PROBLEM = {
    "dataset": "runs/speedrun/drawn",
    "train_split": "train",
    "eval_split": "val",
    "num_eval_pairs": 200,
    "mask_classes": "road_building",
    "vision_model": "runs/tiny-vit",
    "text_model": "kcfi-tiny",
}


def is_there(scores: dict[str, float]) -> bool:
    """Whether an evaluation meets the whole target: the loss from above, scores (in %) from below."""
    loss, *others = TARGET
    return scores[loss] <= TARGET[loss] and all(scores[name] >= TARGET[name] for name in others)


class AtTarget(TrainerCallback):
    """Ends a training at the target."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Ask for the end where the target is met."""
        control.should_training_stop |= is_there(metrics)


def fixed_fields(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The fields of a run that are not free: of the problem, the seed, and the clock."""
    every = options.steps // options.evaluations
    clock = {"max_steps": options.steps, "eval_delay": options.steps // 2, "eval_steps": every, "logging_steps": every}
    clock |= {"eval_strategy": "steps", "logging_strategy": "steps"}  # the log has the seconds
    clock |= {"save_strategy": "no", "load_best_model_at_end": False}
    return {**PROBLEM, **clock, "seed": seed, "output_dir": options.output / options.name / str(seed)}


def run(options: argparse.Namespace, seed: int, more: list[str]) -> Path:
    """Train with a seed until the target or the last step, unless it is done: the folder.

    Raises:
        InputError: fields that do not go together, or the folder has a run with other ones.
    """
    fields = fixed_fields(options, seed)
    settings = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    recipe, folder = parse_recipe(options.recipe, [*more, *settings]), Path(fields["output_dir"])
    if not recipe.model.model_settings.get("use_change_detection_head", True):
        raise InputError("The target has a mask F1: leave out use_change_detection_head=false.")
    if is_complete(folder):
        check_same_recipe(recipe, folder)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MACHINE).write_text(json.dumps(machine()) + "\n", encoding="utf-8")
    if train(recipe, callbacks=[AtTarget()]).stopped:
        sys.exit(f"{folder} was stopped: the same command begins this seed anew.")
    return folder


def main() -> None:
    """Run every seed, write results.json, and print the row of the record list."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", default="synthetic/fine_tuned_128px", help="file or packaged (%(default)s)")
    parser.add_argument("--name", required=True, help="of what is tried: a folder of --output")
    parser.add_argument("--steps", type=int, required=True, help="at which the schedule of the learning rate ends")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(%(default)s)")
    parser.add_argument("--evaluations", type=int, default=20, help="if all were made; divides --steps (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/speedrun"), help="folder (%(default)s)")
    options, more = parser.parse_known_args()
    if shutil.which("java") is None:
        parser.error("S_m* needs Java, which is not on the PATH.")
    if options.steps < 1 or options.evaluations < 1 or options.steps % options.evaluations:
        parser.error(f"--steps {options.steps} is no multiple of --evaluations {options.evaluations}: choose others.")
    chosen = {text.removeprefix("--").partition("=")[0].replace("-", "_") for text in more if text.startswith("--")}
    if taken := chosen & fixed_fields(options, 0).keys():
        parser.error(f"{', '.join(sorted(taken))}: of the problem or of the clock, which are the same for all.")

    rows = []
    for seed in options.seeds:
        try:
            folder = run(options, seed, more)
        except InputError as error:
            parser.error(str(error))
        lines = [line for line in history(folder) if "eval_caption_loss" in line]
        line = next((line for line in lines if is_there(line)), lines[-1])
        rows.append({"seed": seed, "there": is_there(line), "step": line["step"], "seconds": line["seconds"]})
        rows[-1] |= {name: line[name] for name in TARGET}
        where = folder / MACHINE  # the first runs have none
        rows[-1]["machine"] = json.loads(where.read_text(encoding="utf-8")) if where.is_file() else None
    about = {"recipe": options.recipe, "steps": options.steps, "fields": more, "seeds": rows}
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
