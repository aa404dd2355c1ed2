"""What a minute of training brings: one, two, three or five captions behind a prefix, in the same time.

```
python benchmarks/time_to_quality.py synthetic/fine_tuned_128px --minutes 5 --num_eval_pairs 64
```

Packing makes captions cheaper, but a step sees the same pairs: speed in captions does not settle which mix is best.
Every mix trains for about the same time, by the speed of a short trial, with the recipe's learning rates times each
factor, on a schedule that ends when the time does; its best factor by the last caption loss counts (in minutes,
S_m* barely leaves that of a constant sentence). Evaluations are not part of the time. A second call does what is
missing. Needs Java, `pip install "kcfi[bench]"`, and what the recipe names; options that are not listed go to every
run.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from measure import machine

from kcfi.training.arguments import parse_recipe
from kcfi.training.checkpoints import is_complete
from kcfi.training.train import main as train

TRIAL = 12  # steps that tell how long one takes; the first half warms up
RATES = ["learning_rate", "vision_learning_rate", "projector_learning_rate"]
SCORES = ["eval_caption_loss", "eval_s_m", "eval_mask_f1"]


def run(folder: Path, recipe: str, captions: int, factor: float, steps: int, more: list[str], **fields: Any) -> None:
    """Train, unless it is done."""
    rates = parse_recipe(recipe, more).training
    fields |= {name: factor * getattr(rates, name) for name in RATES}
    fields |= {"captions_per_pair": captions, "output_dir": folder, "max_steps": steps}
    fields |= {"save_strategy": "no", "load_best_model_at_end": False}
    if not is_complete(folder):
        train([recipe, *more, *(text for name, value in fields.items() for text in (f"--{name}", str(value)))])


def history(folder: Path) -> list[dict[str, float]]:
    """The log of a run, each line with the seconds of training until then."""
    lines = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    seconds, pairs = 0.0, 0.0
    for line in lines:
        if "pairs_per_second" in line:
            seconds += (line["pairs"] - pairs) / line["pairs_per_second"]
            pairs = line["pairs"]
        line["seconds"] = seconds
    return lines


def reached(curve: list[dict[str, float]], loss: float) -> float | None:
    """Seconds until a curve falls to a caption loss, straight between two evaluations; None if it never does."""
    before: dict[str, float] | None = None
    for line in curve:
        if line["eval_caption_loss"] <= loss:
            if before is None:
                return line["seconds"]
            share = (before["eval_caption_loss"] - loss) / (before["eval_caption_loss"] - line["eval_caption_loss"])
            return before["seconds"] + share * (line["seconds"] - before["seconds"])
        before = line
    return None


def main() -> None:
    """Train every mix, write curves.png and results.json, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file or packaged recipe")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, planned for each run (%(default)s)")
    parser.add_argument("--captions", type=int, nargs="+", default=[1, 2, 3, 5], help="per pair (%(default)s)")
    parser.add_argument(
        "--factors", type=float, nargs="+", default=[0.5, 1, 2], help="of the learning rates (%(default)s)"
    )
    parser.add_argument("--evaluations", type=int, default=5, help="during a run (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/time_to_quality"), help="folder (%(default)s)")
    options, more = parser.parse_known_args()
    if shutil.which("java") is None:
        parser.error("S_m* needs Java, which is not on the PATH.")
    plan = json.dumps([options.recipe, options.minutes, options.evaluations, more])
    options.output.mkdir(parents=True, exist_ok=True)
    noted = options.output / "plan.json"
    if noted.exists() and noted.read_text(encoding="utf-8") != plan:
        parser.error(f"{options.output} holds runs of another recipe or length ({noted}): choose another --output.")
    noted.write_text(plan, encoding="utf-8")

    curves: dict[tuple[int, float], list[dict[str, float]]] = {}
    for captions in options.captions:
        trial = options.output / f"trial-{captions}"
        quiet = {"eval_strategy": "no", "logging_steps": TRIAL // 2}
        run(trial, options.recipe, captions, options.factors[0], TRIAL, more, **quiet)
        last = [line for line in history(trial) if "pairs_per_second" in line][-1]
        per_step = last["pairs"] / TRIAL / last["pairs_per_second"]
        steps = max(options.evaluations, int(options.minutes * 60 / per_step))
        every = max(1, steps // options.evaluations)
        for factor in options.factors:
            folder = options.output / f"{captions}-{factor:g}"
            often = {"eval_strategy": "steps", "eval_steps": every, "logging_steps": every}
            run(folder, options.recipe, captions, factor, every * options.evaluations, more, **often)
            curves[captions, factor] = [line for line in history(folder) if "eval_s_m" in line]

    best = {
        captions: min(options.factors, key=lambda factor: curves[captions, factor][-1]["eval_caption_loss"])
        for captions in options.captions
    }
    figure, panels = plt.subplots(1, len(SCORES), figsize=(4 * len(SCORES), 3.2), layout="constrained")
    for panel, score in zip(panels, SCORES, strict=True):
        for captions, factor in best.items():
            points = [(line["seconds"], line[score]) for line in curves[captions, factor] if score in line]
            panel.plot(*zip(*points, strict=True), marker=".", label=f"{captions} captions, x {factor:g}")
        panel.set(title=score, xlabel="seconds of training")
    panels[0].legend()
    figure.savefig(options.output / "curves.png", dpi=100)

    goal = curves[options.captions[0], best[options.captions[0]]][-1]["eval_caption_loss"]
    heads = ["captions per pair", "learning rates x", "pairs seen", "seconds", *SCORES, f"seconds to loss {goal:.2f}"]
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    rows = []
    for captions, factor in best.items():
        last = curves[captions, factor][-1]
        pairs = [line["pairs"] for line in history(options.output / f"{captions}-{factor:g}") if "pairs" in line][-1]
        seconds = reached(curves[captions, factor], goal)
        rows.append({**last, "captions": captions, "factor": factor, "pairs": pairs, "seconds_to_goal": seconds})
        scores = " | ".join(f"{last[score]:.2f}" for score in SCORES)
        when = "never" if seconds is None else f"{seconds:.0f}"
        print(f"| {captions} | {factor:g} | {pairs:,.0f} | {last['seconds']:.0f} | {scores} | {when} |")
    about = {"machine": machine(), "minutes": options.minutes, "rows": rows}
    (options.output / "results.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
