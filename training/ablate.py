"""Trains and scores a set of recipes with several seeds: `kcfi ablate`.

```
kcfi ablate ablations --dataset LEVIR-MCI                                # the paper's tables: 11 recipes x 3 seeds
kcfi ablate ablations --rows baseline cfe --seeds 0 --dataset LEVIR-MCI --processes 4
```

Every (recipe, seed) has a folder, OUTPUT/cfe-0, with its model, results.json and log.txt. A second call does what is
missing: a finished run is kept, an interrupted one goes on from its checkpoint, a failed one is tried again. So a run
may as well be trained elsewhere: `kcfi train ablations/cfe --seed 0 --output_dir OUTPUT/cfe-0` with the same options.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kcfi.processing import InputError
from kcfi.training.ablation_table import METRICS, RESULTS, AblationSet, read_report, write_tables
from kcfi.training.arguments import Recipe, parse_recipe
from kcfi.training.checkpoints import complete_checkpoints, is_complete
from kcfi.training.scoring.evaluate import flat_scores
from kcfi.training.train import check_same_recipe

# The last line of a traceback, or what `kcfi` says of bad input; torchrun puts the rank in front.
ERROR = re.compile(r"(?:\[rank\d+\]: ?)?((?:kcfi: error:|[\w.]+(?:Error|Exception)\b).*)")


def ablate(
    plan: AblationSet,
    runs: Mapping[str, tuple[Path, int]],
    output: Path,
    overrides: Sequence[str] = (),
    meteor: bool = True,
    processes: int = 1,
) -> dict[str, str]:
    """Train and score the runs that are not finished; after each one, write the table of the whole set anew.

    Args:
        plan: of `read_set`.
        runs: of `plan.runs`.
        output: folder of the runs and the table.
        overrides: `--field value` for all recipes, as in `parse_recipe`.
        meteor: False does without Java, METEOR and S_m*.
        processes: of a training, one per GPU.

    Returns:
        The last line of the error of every run that failed, by the name of the run.

    Raises:
        InputError: a recipe that cannot be read, or a run that began with other settings; then nothing has run.
    """
    for option in overrides:
        if option.split("=")[0] in ("--seed", "--output_dir", "--output-dir"):
            raise InputError(f"{option}: every run has its own; choose --seeds and --output.")
    errors, commands, recipes = dict[str, str](), dict[str, list[str]](), dict[str, Recipe]()
    for run, (path, seed) in runs.items():
        settings = [*overrides, "--seed", str(seed), "--output_dir", str(output / run)]
        recipes[run] = parse_recipe(path, settings, starts=False)
        commands[run] = ["train", str(path), *settings]
        if _has_begun(output / run):
            check_same_recipe(recipes[run], output / run)

    for number, run in enumerate(runs, start=1):
        print(f"{number}/{len(runs)} {run}: ", end="", flush=True)
        start, folder, error = time.monotonic(), output / run, None
        if not _is_scored(folder, meteor):
            if not is_complete(folder):
                resume = ["--resume"] if _has_begun(folder) else []
                error = _call([*commands[run], *resume], folder, processes, bool(recipes[run].training.deepspeed))
                if not error and not is_complete(folder):
                    error = "stopped by SIGTERM"
            error = error or _call(_evaluation(recipes[run], folder, plan.split, meteor), folder)
        if error:
            errors[run] = error
        print(f"failed: {error}" if error else f"{_headline(folder)} ({(time.monotonic() - start) / 60:.1f} min)")
        write_tables(plan, output, errors)
    return errors


def _has_begun(folder: Path) -> bool:
    """Whether a run has something to go on from: a complete checkpoint, or its end."""
    return is_complete(folder) or bool(complete_checkpoints(folder))


def _is_scored(folder: Path, meteor: bool) -> bool:
    """Whether a run has all its scores; without Java those of METEOR are missing, beside the others of captions."""
    if not (folder / RESULTS).exists():
        return False
    scores = flat_scores(read_report(folder))
    return not meteor or "meteor" in scores or "bleu_4" not in scores


def _evaluation(recipe: Recipe, folder: Path, split: str, meteor: bool) -> list[str]:
    """The `kcfi evaluate` of a run, on a split of the data that it was trained on."""
    data = recipe.data
    options = {"model": folder, "dataset": data.dataset, "split": split, "output": folder / RESULTS}
    options |= {"seed": data.dataset_seed, "mask_classes": data.mask_classes, "materials": data.materials}
    options["dataset_revision"] = data.dataset_revision
    args = recipe.training
    options |= {"feature_cache": args.feature_cache, "max_new_tokens": args.generation_max_new_tokens}
    options |= {name: json.dumps(value) for name in ("columns", "pair_mix") if (value := getattr(data, name))}
    texts = [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]
    return ["evaluate", *texts, *([] if meteor else ["--no-meteor"])]


def _call(command: Sequence[str], folder: Path, processes: int = 1, deepspeed: bool = False) -> str | None:
    """Run a `kcfi` command in processes of its own, its output in log.txt; what went wrong, or None.

    A crash, or a process that is killed for its memory, ends that run alone. DeepSpeed needs a launcher even for one
    process.
    """
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 or deepspeed else []
    program = [sys.executable, *launcher, "-m", "kcfi_cli", *command]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a+b") as log:
        start = log.seek(0, 2)
        code = subprocess.run(program, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        log.seek(start)
        text = log.read().decode(errors="replace")
    return f"exit code {code}: {last_error(text)}" if code else None


def last_error(log: str) -> str:
    """The line that says best why a run failed: the end of its last traceback, or else whatever it printed last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    found = [match[1] for line in lines if (match := ERROR.fullmatch(line)) and "ChildFailedError" not in line]
    return (found or lines or ["no output"])[-1]


def _headline(folder: Path) -> str:
    scores = flat_scores(read_report(folder))
    return ", ".join(f"{METRICS[name]} {scores[name]:.2f}" for name in ("cider_d", "s_m", "mask_f1") if name in scores)
