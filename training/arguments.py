"""The dataclasses that are the whole command line of training, and the recipes (YAML) that fill them."""

import dataclasses
import difflib
import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames

from kcfi.files import as_dict, check_names, parse_yaml, read_yaml
from kcfi.processing import InputError
from kcfi.training.zero import find_settings, require_deepspeed

RECIPES = Path(__file__).parent / "recipes"
SETS = ("ablations", "synthetic_ablations", "real_ablations", "levir_choices", "levir_few")  # for `kcfi ablate`


@dataclass
class ModelArguments:
    """The model to train: either one to continue from, or two towers to join."""

    model: str | None = field(
        default=None,
        metadata={"help": "KCFI model to continue from: a folder, a Hub id, or kcfi-tiny (the embedded model)."},
    )
    model_revision: str | None = field(
        default=None,
        metadata={
            "help": "Branch, tag or commit of `model` on the Hub (default: the newest). Of this and the three other "
            "revisions the run's recipe.yaml holds the commit that was found."
        },
    )
    vision_model: str | None = field(
        default=None, metadata={"help": "Pretrained vision tower of a new model: a folder or a Hub id."}
    )
    vision_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `vision_model` on the Hub (default: the newest)."}
    )
    vision_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Config of a vision tower that starts from random weights (JSON, with its model_type)."},
    )
    text_model: str | None = field(
        default=None, metadata={"help": "Language model of a new model, with its tokenizer: a folder or a Hub id."}
    )
    text_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `text_model` on the Hub (default: the newest)."}
    )
    model_settings: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "KCFIConfig fields of a new model (JSON; one alone: --model_settings.flow_residual cross)."},
    )
    lora: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "LoRA on the language model's linear layers: fields of peft.LoraConfig (JSON; one alone: --lora.r "
            "8; default: none, the paper's)."
        },
    )
    shortest_edge: int | None = field(
        default=None,
        metadata={
            "help": "Of a new model: resize the shorter side to this many pixels and crop the centre (default: resize "
            "the whole image, nothing is cropped)."
        },
    )


@dataclass
class DataArguments:
    """The pairs to train on and to choose the best checkpoint with."""

    dataset: str = field(
        default="synthetic",
        metadata={
            "help": "'synthetic', a LEVIR-CC / LEVIR-MCI / LEVIR-CD folder, or what `datasets` opens: a folder of "
            "parquet shards, webdataset tars, images with metadata or JSON lines, or a Hub id."
        },
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `dataset` on the Hub (default: the newest)."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read what `datasets` opens row by row instead of shard by shard or from its cache: nothing is "
            "downloaded first, the order is random within a buffer, and `max_steps` says how long to train."
        },
    )
    columns: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "What a data set that `datasets` opens calls our columns image_before, image_after, mask, "
            "captions, changed and filename, where the names differ (JSON; one alone: --columns.image_before A)."
        },
    )
    ground_sampling_distance: float | None = field(
        default=None,
        metadata={
            "help": "Metres per pixel of the training images, saved with the model (0.5 in LEVIR-CC and in drawn "
            "pairs; default: not known)."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="val", metadata={"help": "Split the best checkpoint is chosen on (never test)."})
    num_train_pairs: int | None = field(
        default=None, metadata={"help": "Pairs to train on (default: all, 5000 of 'synthetic')."}
    )
    crops_per_scene: int | None = field(
        default=None,
        metadata={
            "help": "Crops that every scene was cut into, numbered in the file names one scene after the other (16 in "
            "LEVIR-CC): `num_train_pairs` then takes scene after scene in an order drawn by `seed`, so that a smaller "
            "number is part of a larger one."
        },
    )
    num_eval_pairs: int | None = field(
        default=None, metadata={"help": "Pairs to evaluate on (default: all, 500 of 'synthetic')."}
    )
    dataset_seed: int = field(default=0, metadata={"help": "Seed of the synthetic scenes; other data has none."})
    materials: str | None = field(
        default=None,
        metadata={"help": "Library of real surfaces that 'synthetic' draws with, made by `kcfi data materials`."},
    )
    pair_mix: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Weights of the kinds of 'synthetic' pairs: drawn, composed (real ground and roofs), single_date "
            "(one real image twice), developed (two real images), two_places (any two labelled images, masks alone); "
            "JSON; one alone: --pair_mix.composed 2 (default: all with sentences alike with materials, only drawn "
            "without)."
        },
    )
    mask_classes: Literal["change", "building", "road_building"] = field(
        default="change",
        metadata={"help": "Classes made of the masks: change (road or building), building, or road and building."},
    )
    captions_per_pair: int = field(
        default=5,
        metadata={
            "help": "Captions drawn per pair and visit, 1 to 5; they share the pair and the prompt (the paper: 1)."
        },
    )
    augment: bool = field(
        default=False,
        metadata={
            "help": "In training, mirror pairs at random with the words of their captions, and jitter the colours of "
            "each date (the paper does not)."
        },
    )


@dataclass
class KCFITrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the paper's defaults (section IV.B) and the settings of the two losses."""

    learning_rate: float = field(
        default=1e-4, metadata={"help": "Peak learning rate of the perceiver, the head and all else without its own."}
    )
    vision_learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of the vision tower."})
    projector_learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of the projector."})
    weight_decay: float = field(
        default=5e-4, metadata={"help": "Decoupled weight decay of AdamW; biases and norms have none."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warm-up."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up: a fraction of all optimizer steps (below 1), or their number."}
    )
    num_train_epochs: float = field(default=50.0, metadata={"help": "Epochs; one epoch visits every pair once."})
    per_device_train_batch_size: int = field(
        default=32, metadata={"help": "Pairs per micro-batch and device (each with `captions_per_pair` captions)."}
    )
    muon: bool = field(
        default=False,
        metadata={
            "help": "Muon (timm's) for the matrices of what joins the towers, the perceiver, the projector and the "
            "head; NAdamW, part of it, for all else, LoRA adapters too."
        },
    )
    objective: Literal["cross_entropy", "scst"] = field(
        default="cross_entropy",
        metadata={
            "help": "What sentences are trained by: cross_entropy (eq. 8), or scst, as a second stage of a finished "
            "`model`: it draws `captions_per_pair` captions of its own per pair, and those that score above its "
            "greedy one in CIDEr-D become likelier (docs/training.md)."
        },
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Evaluate, choose and end with an exponential moving average of the weights, of this decay per "
            "optimizer step: 0.99 averages over about a hundred steps (0 = no average)."
        },
    )
    train_language_model: bool = field(default=False, metadata={"help": "Train the language model too."})
    train_vision_tower: bool = field(
        default=True, metadata={"help": "Fine-tune the vision tower (Table III: w/ ft); false = keep it frozen."}
    )
    bf16_language_model: bool = field(
        default=False,
        metadata={
            "help": "Keep the weights of a frozen language model in bf16, half the memory; all that trains stays in "
            "fp32, LoRA adapters too."
        },
    )
    use_liger_kernel: bool = field(
        default=False,
        metadata={"help": "The caption loss by Liger's fused kernel, on a GPU (`pip install 'kcfi[liger]'`)."},
    )
    activation_checkpointing_towers: Literal["both", "vision", "language"] = field(
        default="both",
        metadata={"help": "Where `activation_checkpointing` computes blocks twice instead of keeping activations."},
    )
    feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder where a frozen vision tower's features of every image are kept, to be computed once for "
            "all epochs and runs (2 MB per image of DINOv2-S at 252 px)."
        },
    )
    dwa: Literal["none", "step", "window", "epoch"] = field(
        default="step",
        metadata={
            "help": "Dynamic weight averaging (eq. 10) over the losses of one optimizer step (the paper), of "
            "`dwa_window` steps, of an epoch; none = equal weights. 'window' with temperature 2 swings least."
        },
    )
    dwa_temperature: float = field(
        default=0.2, metadata={"help": "T of eq. 10, above 0 (2.0 in the authors' code): larger = more even weights."}
    )
    dwa_window: int = field(default=50, metadata={"help": "Optimizer steps of a window, for dwa = window."})
    deepspeed: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Settings of DeepSpeed: zero2, zero3, zero2_offload, zero3_offload, or a JSON file; started by "
            "torchrun (docs/cluster.md)."
        },
    )
    max_unreadable: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training pairs, 0 to 1, whose images may be missing or broken: each is named, and "
            "the next pair stands in for it. Beyond it training stops (0 = at the first)."
        },
    )
    generation_max_new_tokens: int = field(
        default=64, metadata={"help": "Longest caption in evaluation, in tokens (greedy decoding)."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept, the best one among them."})
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "End with the checkpoint that scored best on the evaluation split."}
    )
    metric_for_best_model: str | None = field(
        default="s_m", metadata={"help": "Score of the best checkpoint: s_m (mean of four caption scores), mask_f1..."}
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "False when the score is a loss."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two lines of the log."})
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={
            "help": "Trackers: tensorboard (the default; left out where it is not installed), wandb, mlflow ..., or "
            "none."
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=True,
        metadata={"help": "Keep true: the change detection head has no gradient in a batch without masks."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep false: the collator reads columns that the model does not know."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Keep: captions alone make a loss, masks may be absent."}
    )

    def __post_init__(self) -> None:
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False  # there is no score to choose by
        settings = self.deepspeed
        if isinstance(settings, str) and not settings.startswith("{"):
            self.deepspeed = str(find_settings(settings))
        if settings:
            require_deepspeed(self.use_cpu)
        super().__post_init__()
        self.report_to = self.report_to or ["none"]  # an empty list cannot be written on a command line
        self.deepspeed = settings  # a saved recipe names the settings, not where kcfi is installed
        if self.dwa_temperature <= 0:
            raise InputError(f"dwa_temperature={self.dwa_temperature} must be above 0 (0.2 in the paper).")
        if not 0 <= self.max_unreadable < 1:
            raise InputError(f"max_unreadable={self.max_unreadable} must be at least 0 and below 1.")
        if self.liger_kernel_config is not None:
            raise InputError("liger_kernel_config: `use_liger_kernel` takes one kernel, which has no settings.")
        if self.bf16_language_model and self.train_language_model:
            raise InputError("bf16_language_model: small updates are lost in bf16; leave out train_language_model.")
        if self.bf16_language_model and self.deepspeed:
            raise InputError("bf16_language_model: DeepSpeed keeps all weights in bf16 by `bf16: true`, or none.")
        if self.activation_checkpointing_towers != "both" and not self.activation_checkpointing:
            raise InputError(
                f"activation_checkpointing_towers={self.activation_checkpointing_towers} changes nothing without "
                "`activation_checkpointing: true`."
            )
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay={self.ema_decay} must be at least 0 (no average) and below 1.")
        if self.ema_decay and (self.deepspeed or self.fsdp):
            raise InputError("ema_decay: the weights of a model that is split among processes are not averaged.")
        if self.muon and (self.deepspeed or self.fsdp):
            raise InputError("muon: it needs whole matrices, and not those that are split among processes.")
        if self.muon and self.optim != field_defaults()["optim"]:
            raise InputError(
                f"muon takes the place of optim={OptimizerNames(self.optim).value}: leave one of them out."
            )
        if self.dwa_window < 1:
            raise InputError(f"dwa_window={self.dwa_window} must be at least 1 optimizer step.")


GROUPS: tuple[Any, ...] = (ModelArguments, DataArguments, KCFITrainingArguments)


@dataclass
class Recipe:
    """A parsed recipe: its three groups of arguments, and `values`, what has to be written to a file to repeat it."""

    model: ModelArguments
    data: DataArguments
    training: KCFITrainingArguments
    values: dict[str, Any]


def parse_recipe(recipe: str | Path, overrides: Sequence[str] = (), starts: bool = True) -> Recipe:
    """Read a recipe and the command-line options that change it.

    A recipe with a line `base: NAME_OR_PATH` (a packaged recipe, or a file relative to its own folder) is that recipe
    with its own values in place of the base's; of `model_settings`, entry by entry. `null` switches a field off whose
    type allows None, whatever the base says.

    Args:
        recipe: a YAML file of `field: value` lines, or the name of a packaged one ("debug", "ablations/baseline").
        overrides: `--field value`, `--field=value`, `--field a b` for lists, `--model_settings.field value` for one
            entry of a dictionary, `--flag` for a true flag, `--field null` to switch it off.
        starts: this process will train. False: another one will, which a launcher starts if it needs DeepSpeed.

    Raises:
        InputError: no such recipe, bases in a circle, an unknown field (with the nearest name), a value of the wrong
            type, or `null` for a field that must have a value.
    """
    values, optional = _read(find_recipe(recipe)), optional_fields()
    for name, value in _overrides(overrides):
        group, _, entry = name.partition(".")
        if entry:
            values[group] = {**as_dict(values.get(group)), entry: parse_yaml(" ".join(value))}
        elif value == ["null"] and name in optional:
            values[name] = None
        else:
            values[name] = value if len(value) > 1 else value[0]
    check_names(values, known_fields(), "field")
    deepspeed = None if starts else values.pop("deepspeed", None)
    parser = _Parser(GROUPS, allow_abbrev=False)
    parser.set_defaults(**{name: None for name, value in values.items() if value is None})
    try:
        model, data, training = parser.parse_args_into_dataclasses(_argv(values), look_for_args_file=False)
    except InputError:
        raise
    except (ValueError, TypeError) as error:  # all else is no matter of the settings
        raise InputError(f"{recipe}: settings that are not understood, or do not go together ({error}).") from error
    training.deepspeed = training.deepspeed or deepspeed
    model.vision_config, model.model_settings = as_dict(model.vision_config), as_dict(model.model_settings)
    model.lora = as_dict(model.lora)
    data.columns, data.pair_mix = as_dict(data.columns), as_dict(data.pair_mix)
    parsed = {**vars(model), **vars(data), **training.to_dict()}
    names, defaults = dict.fromkeys([*_own_fields(), *values]), field_defaults()
    unset = [name for name in names if parsed[name] in ({}, []) or parsed[name] is defaults[name] is None]
    return Recipe(model, data, training, {name: parsed[name] for name in names if name not in unset})


def packaged_recipes() -> dict[str, Path]:
    """The packaged recipes by name, "debug" or "ablations/cfe"; without the sets of them (`SETS`)."""
    paths = [*sorted(RECIPES.glob("*.yaml")), *sorted(RECIPES.glob("*/*.yaml"))]
    names = {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in paths}
    return {name: path for name, path in names.items() if name not in SETS}


def find_recipe(recipe: str | Path, folder: Path = Path()) -> Path:
    """The file of a recipe: the path itself, relative to `folder`, or the packaged recipe of that name.

    Raises:
        InputError: neither exists; the message lists the packaged ones.
    """
    packaged = packaged_recipes()
    if (folder / recipe).is_file():
        return folder / recipe
    name = str(recipe).removesuffix(".yaml")
    if name not in packaged:
        nearest = difflib.get_close_matches(name, packaged, n=1)
        hint = f"did you mean {nearest[0]!r}? Else " if nearest else ""
        names = ", ".join(packaged)
        raise InputError(f"No recipe {recipe}: {hint}give a YAML file, or one of the packaged recipes: {names}.")
    return packaged[name]


def known_fields() -> dict[str, dataclasses.Field[Any]]:
    """Every field a recipe may set, by name."""
    return {entry.name: entry for group in GROUPS for entry in dataclasses.fields(group)}


def field_defaults() -> dict[str, Any]:
    """What every field is when no recipe sets it."""
    return {
        name: entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        for name, entry in known_fields().items()
    }


def optional_fields() -> list[str]:
    """The fields that a recipe may set to `null`: those whose type allows None."""
    hints = {name: hint for group in GROUPS for name, hint in get_type_hints(group).items()}
    return [name for name in known_fields() if type(None) in get_args(hints[name])]


def field_help() -> str:
    """The fields of a recipe that are KCFI's own, one paragraph each, for `kcfi train --help`."""
    lines = ["fields of a recipe, beside all those of transformers.TrainingArguments:"]
    for name, entry in known_fields().items():
        if name in _own_fields():
            default = "" if entry.default in (None, dataclasses.MISSING) else f" (default: {entry.default})"
            lines.append(textwrap.fill(f"{name}: {entry.metadata['help']}{default}", 100, subsequent_indent="      "))
    return "\n  ".join(lines)


class _Parser(HfArgumentParser):
    """Raises `InputError` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def _own_fields() -> list[str]:
    """Fields that are KCFI's own or have a default of its own; they are saved with a run even when not given."""
    own = {entry.name for group in (ModelArguments, DataArguments) for entry in dataclasses.fields(group)}
    own |= {"seed", *KCFITrainingArguments.__annotations__}
    return [name for name in known_fields() if name in own]


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe and, below them, those of its base; `above` are the recipes that led here."""
    above = (*above, path.resolve())
    if above[-1] in above[:-1]:
        raise InputError(f"Recipes are each other's base: {' -> '.join(map(str, above))}.")
    values = read_yaml(path, optional_fields())
    if "base" not in values:
        return values
    base = _read(find_recipe(str(values.pop("base")), path.parent), above)
    own = values.get("model_settings", {})
    settings = None if own is None else {**as_dict(base.get("model_settings")), **as_dict(own)}
    return {**base, **values, "model_settings": settings}


def _overrides(arguments: Sequence[str]) -> Iterable[tuple[str, list[str]]]:
    """`["--a", "1", "--b=2", "--c"]` -> ("a", ["1"]), ("b", ["2"]), ("c", ["true"])."""
    position = 0
    while position < len(arguments):
        option = arguments[position]
        if not option.startswith("--"):
            raise InputError(f"Unexpected {option!r}: options are written --field value, after the recipe.")
        name, equals, value = option[2:].partition("=")
        end = position + 1
        while not equals and end < len(arguments) and not arguments[end].startswith("--"):
            end += 1
        yield name.replace("-", "_"), [value] if equals else (list(arguments[position + 1 : end]) or ["true"])
        position = end


def _argv(values: dict[str, Any]) -> list[str]:
    """Values of a recipe as the options argparse reads, so that it converts every type."""
    arguments = []
    for name, value in values.items():
        if value is None:  # the parser's default
            continue
        texts = value if isinstance(value, list) else [value]
        arguments.append(f"--{name}")
        arguments += [
            str(text) if isinstance(text, str | float) and not isinstance(text, bool) else json.dumps(text)
            for text in texts
        ]
    return arguments
