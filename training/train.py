"""Training from a recipe.

```
kcfi train debug                                     # packaged, under two minutes on two CPU cores
kcfi train my_recipe.yaml --learning_rate 5e-5 --model_settings.flow_residual cross
kcfi train my_recipe.yaml --resume
```
"""

import argparse
import platform
import re
import shutil
import subprocess
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, set_seed
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from kcfi.files import as_dict, read_yaml, write_whole
from kcfi.modeling_kcfi import KCFIForConditionalGeneration
from kcfi.models import NO_CODE, merge_lora, model_source
from kcfi.processing import InputError, KCFIProcessor, refusing
from kcfi.towers import join_towers
from kcfi.training.arguments import ModelArguments, Recipe, field_defaults, field_help, parse_recipe
from kcfi.training.checkpoints import (
    check_writable,
    complete_checkpoints,
    flush,
    is_complete,
    mark,
    writing,
    written_since,
)
from kcfi.training.collator import KCFICollator
from kcfi.training.data.rows import RowDataset, RowStream
from kcfi.training.data.scenes import take_scenes
from kcfi.training.data.shards import ShardDataset
from kcfi.training.load import load_pairs
from kcfi.training.lora import add_lora
from kcfi.training.scoring.evaluate import check_classes
from kcfi.training.synthetic.material_library import attributions
from kcfi.training.trainer import KCFITrainer
from kcfi.training.zero import whole_weights

REVISIONS = ("model_revision", "vision_model_revision", "text_model_revision")  # fields of `ModelArguments`


def main(argv: Sequence[str] | None = None) -> None:
    """Run `kcfi train`; `argv` is what stands behind it."""
    parser = argparse.ArgumentParser(
        "kcfi train",
        usage="kcfi train RECIPE [--field value ...] [--resume]",
        description=__doc__.replace("```\n", ""),  # fences are for readers of the code
        epilog=field_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe", nargs="?", help="YAML file of `field: value` lines, or the name of a packaged recipe"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of output_dir")
    options, overrides = parser.parse_known_args(argv)
    if options.recipe is None:
        raise InputError("Name a recipe: a YAML file or a packaged one, for example `kcfi train debug`.")
    recipe = parse_recipe(options.recipe, overrides)
    output_dir = Path(str(recipe.training.output_dir))
    if options.resume and is_complete(output_dir):
        check_same_recipe(recipe, output_dir)
        print(f"{output_dir} is finished: there is nothing to resume.")
        return
    checkpoint = find_checkpoint(output_dir, options.resume)
    check_writable(output_dir)
    if options.resume:
        check_same_recipe(recipe, output_dir)
    with error_kept(output_dir, recipe.training.process_index):
        trainer = train(recipe, checkpoint)
    # all together, and out of the process group: a rank that exits while its threads still wait for others is aborted
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


@contextmanager
def error_kept(output_dir: Path, rank: int = 0) -> Iterator[None]:
    """Write the traceback of a run that fails into its folder, and say so in a note of the error.

    Args:
        output_dir: folder of the run; bad input that is found before it is there leaves none.
        rank: number of this process; each has a file of its own.
    """
    file = output_dir / (f"error_rank{rank}.txt" if rank else "error.txt")
    file.unlink(missing_ok=True)  # of an earlier start
    try:
        yield
    except Exception as error:
        if output_dir.is_dir() or not isinstance(error, InputError | OSError):
            with suppress(OSError):  # the disk may be what failed
                output_dir.mkdir(parents=True, exist_ok=True)
                file.write_text(traceback.format_exc(), encoding="utf-8")
                error.add_note(f"The traceback is in {file}.")
        raise


def train(
    recipe: Recipe, checkpoint: str | None = None, callbacks: Sequence[TrainerCallback] | None = None
) -> KCFITrainer:
    """Load data, build model, build trainer, train, save.

    Args:
        recipe: of `parse_recipe`.
        checkpoint: of `find_checkpoint`, to go on from.
        callbacks: for the trainer, beside its own.

    Raises:
        FileNotFoundError: no such data set.
        InputError: settings that do not fit together.
        OSError: what is to be saved does not fit on the disk.
    """
    args, data = recipe.training, recipe.data
    output_dir = Path(str(args.output_dir))
    if checkpoint:
        take_commits(recipe, output_dir)
    source: dict[str, Any] = {
        "seed": data.dataset_seed,
        "columns": as_dict(data.columns),
        "materials": data.materials,
        "pair_mix": as_dict(data.pair_mix),
        "streaming": data.streaming,
    }
    first = data.num_train_pairs if data.crops_per_scene is None else None
    train_pairs: Any = load_pairs(data.dataset, data.train_split, first, revision=data.dataset_revision, **source)
    if data.crops_per_scene is not None:
        train_pairs = take_scenes(train_pairs, data.num_train_pairs, data.crops_per_scene, args.seed)
    if isinstance(train_pairs, ShardDataset | RowDataset | RowStream) and train_pairs.commit:
        data.dataset_revision = recipe.values["dataset_revision"] = train_pairs.commit
    if isinstance(train_pairs, RowStream):
        train_pairs = train_pairs.shuffled(args.seed if args.data_seed is None else args.data_seed)
    eval_pairs = None
    if args.eval_strategy != "no":
        eval_pairs = load_pairs(
            data.dataset, data.eval_split, data.num_eval_pairs, revision=data.dataset_revision, **source
        )

    if args.objective == "scst" and recipe.model.model is None:
        raise InputError("objective=scst goes on from captions that a model can write: give `model`, a finished one.")
    pin_models(recipe)
    set_seed(args.seed)
    with whole_weights(args):
        model, processor = build_model(recipe.model)
    check_classes(model, data.mask_classes)
    processor.ground_sampling_distance = data.ground_sampling_distance
    if recipe.model.lora:
        add_lora(model, as_dict(recipe.model.lora), args)
    trainer = KCFITrainer(
        model,
        args,
        KCFICollator(processor, data.mask_classes, data.captions_per_pair, seed=args.seed, augment=data.augment),
        train_dataset=train_pairs,
        eval_dataset=eval_pairs,
        processing_class=processor,
        callbacks=list(callbacks or ()),
    )
    if trainer.is_world_process_zero():
        save_recipe(recipe, output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stopped:
        if trainer.is_world_process_zero():
            print(f"Stopped by SIGTERM behind step {trainer.state.global_step}: go on with --resume.")
        return trainer
    with writing(output_dir, trainer.state.global_step):
        trainer.save_model()
        trainer.save_state()
        if trainer.is_world_process_zero():
            files = written_since(output_dir / "recipe.yaml")
            flush(output_dir, files)
            mark(output_dir, trainer.state.global_step, [file for file in files if file.suffix == ".safetensors"])
    return trainer


def build_model(args: ModelArguments) -> tuple[KCFIForConditionalGeneration, KCFIProcessor]:
    """The model and its processor, in fp32: a finished one to continue from, or a new one of two towers.

    An adapter of a finished model is merged.

    Raises:
        InputError: neither or both are given, an unknown setting, or no such folder.
    """
    if args.model is not None:
        new = [name for name, value in vars(args).items() if name not in ("model", *REVISIONS, "lora") and value]
        if new:
            raise InputError(f"`model` is a finished model: leave out {', '.join(new)}.")
        source, revision = model_source(args.model), args.model_revision
        with refusing(f"Cannot load the model {args.model!r}"):
            options = {"revision": revision, **NO_CODE}
            model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, **options)
            processor = AutoProcessor.from_pretrained(source, **options)
        return merge_lora(model), processor
    settings, vision_config = as_dict(args.model_settings), as_dict(args.vision_config)
    if args.text_model is None or bool(args.vision_model) == bool(vision_config):
        raise InputError("Give `model`, or `text_model` and one of `vision_model` and `vision_config`.")
    vision = model_source(args.vision_model) if args.vision_model else vision_config
    model, processor = join_towers(
        vision,
        model_source(args.text_model),
        args.shortest_edge,
        vision_revision=args.vision_model_revision,
        text_revision=args.text_model_revision,
        **settings,
    )
    if not args.vision_model and any(isinstance(part, nn.BatchNorm2d) for part in model.model.vision_tower.modules()):
        raise InputError(
            "The vision tower has batch norms, which keep the statistics they come with: it needs pretrained weights, "
            "`vision_model` instead of `vision_config`."
        )
    return model, processor


def pin_models(recipe: Recipe) -> None:
    """Put the commit that every model of the Hub stands for into a recipe, so that all its files come from that one.

    Raises:
        InputError: a revision for what is no model of the Hub.
        OSError: no such model or revision, or no connection to the Hub.
    """
    for name in REVISIONS:
        field = name.removesuffix("_revision")
        model, revision = getattr(recipe.model, field), getattr(recipe.model, name)
        if model is not None and not Path(model_source(model)).is_dir():
            try:
                file = cached_file(model, CONFIG_NAME, revision=revision)
            except OSError as error:
                raise OSError(
                    f"{field}: cannot load {model!r} at {revision or 'its newest commit'}: {error}"
                ) from error
            recipe.values[name] = extract_commit_hash(file, None)
            setattr(recipe.model, name, recipe.values[name])
        elif revision:
            raise InputError(f"{name} is {revision}, but {field} is {model or 'not given'}, no model of the Hub.")


def find_checkpoint(output_dir: Path, resume: bool) -> str | None:
    """The newest complete checkpoint of a run, or None for a new run.

    Raises:
        InputError: there is none to resume; or a new run would mix its files with those of an old one.
    """
    complete = complete_checkpoints(output_dir)
    if complete and resume:
        return str(complete[-1])
    if complete or is_complete(output_dir):
        raise InputError(f"{output_dir} holds a run: continue it with --resume, or choose another --output_dir.")
    unmarked = [path for pattern in ("checkpoint-*", "*.safetensors") for path in output_dir.glob(pattern)]
    if unmarked:
        raise InputError(
            f"{output_dir} holds checkpoints or weights without a marker, like {unmarked[0].name}: they are of an "
            "older version, copied in part, or what a run that was killed in its last save has left. None of them can "
            "be resumed; choose another --output_dir, or delete them."
        )
    if resume:
        raise InputError(f"Nothing to resume: {output_dir} has no complete checkpoint. Start without --resume.")
    return None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit; a branch, a tag or None may stand for another one by now."""
    return re.fullmatch("[0-9a-f]{40}", revision or "") is not None


def check_same_recipe(recipe: Recipe, output_dir: Path) -> None:
    """Refuse to resume a run with other settings than it began with: its recipe.yaml would no longer tell the truth.

    The folder itself may have moved, a field that recipe.yaml does not know had its default, and how many workers load
    the pairs is a matter of the machine (`KCFITrainer` refuses it where the order of the pairs depends on it). A
    revision that is not given, a branch or a tag is the commit of the run, see `take_commits`.

    Raises:
        InputError: names each setting that differs, with both values.
    """
    file = output_dir / "recipe.yaml"
    saved = read_yaml(file, optional=None)
    began = {**field_defaults(), **saved}
    now = {**field_defaults(), **yaml.safe_load(yaml.safe_dump(recipe.values))}
    changed = [
        f"{name}: {began[name]} -> {now.get(name)}"
        for name in dict.fromkeys([*saved, *now])
        if began[name] != now.get(name)
        and name not in ("output_dir", "dataloader_num_workers")
        and not (name in (*REVISIONS, "dataset_revision") and not is_commit(now.get(name)))
    ]
    if changed:
        raise InputError(
            f"{output_dir} was started with other settings ({'; '.join(changed)}). Resume with its own recipe, `kcfi "
            f"train {file} --resume` (edit that file for a change you mean), or choose another --output_dir."
        )


def take_commits(recipe: Recipe, output_dir: Path) -> None:
    """Give a recipe to resume with the commits of the Hub that the run began with: newer ones may be there by now."""
    saved = read_yaml(output_dir / "recipe.yaml", optional=None)
    for name in REVISIONS:
        setattr(recipe.model, name, saved.get(name))
    recipe.data.dataset_revision = saved.get("dataset_revision")


def save_recipe(recipe: Recipe, output_dir: Path) -> None:
    """Write recipe.yaml, which repeats the run; versions, git revision and sources of materials as comments.

    Its revisions are the commits of what came from the Hub.
    """
    packages = ", ".join(f"{name} {version(name)}" for name in ("kcfi", "transformers", "torch", "datasets"))
    header = f"# {packages}, python {platform.python_version()}\n# git revision: {git_revision()}\n"
    if recipe.data.materials:
        header += "".join(f"# materials: {source}\n" for source in attributions(recipe.data.materials))
    output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(output_dir / "recipe.yaml", header + yaml.safe_dump(recipe.values, sort_keys=False))


def git_revision() -> str:
    """Commit of the code that runs, with "-dirty" if it was changed; "unknown" outside a git checkout of it.

    Installed into an environment inside somebody's repository it is no part of that one: git does not track this file.
    """
    if shutil.which("git") is None:
        return "unknown"
    file = Path(__file__).resolve()
    for command in (["ls-files", "--error-unmatch", file.name], ["describe", "--always", "--dirty"]):
        git = subprocess.run(["git", *command], cwd=file.parent, capture_output=True, text=True, check=False)
        if git.returncode:
            return "unknown"
    return git.stdout.strip()


if __name__ == "__main__":
    main()
