"""The model card of a run: what `kcfi push` and `KCFITrainer.push_to_hub` put beside the weights as README.md.

`model_card` is a pure function of what a run left; `card_of_run` reads that from its folder.
"""

import csv
import re
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import metadata, requires
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from kcfi.files import read_json, read_yaml
from kcfi.modeling_kcfi import KCFIConfig
from kcfi.models import embedded_model
from kcfi.processing import InputError, refusing
from kcfi.training.data.pairs import CLASS_NAMES

RECIPE_FILE, RESULTS_FILE, CARD_FILE = "recipe.yaml", "results.json", "README.md"
SHEET_FILE = "pairs.png"  # of `kcfi evaluate`, beside its results
ENERGY_FILE = "emissions.csv"  # of `report_to: codecarbon`, a line per start
ORIGINS = ("model", "vision_model", "text_model")  # fields of a recipe: what a run starts from
TAGS = ("kcfi", "remote-sensing", "change-captioning", "change-detection")
TASK = "image-text-to-text"
# Score of results.json -> the Hub's name of its metric, the name that people read
CAPTION_METRICS = {
    "bleu_1": ("bleu", "BLEU-1"),
    "bleu_2": ("bleu", "BLEU-2"),
    "bleu_3": ("bleu", "BLEU-3"),
    "bleu_4": ("bleu", "BLEU-4"),
    "meteor": ("meteor", "METEOR"),
    "rouge_l": ("rouge", "ROUGE-L"),
    "cider_d": ("cider", "CIDEr-D"),
    "s_m": ("s_m", "S_m*"),
}
MASK_METRICS = {"f1": "F1", "iou": "IoU", "precision": "precision", "recall": "recall"}

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

Two co-registered images of one place, before and after, go in; an English sentence of *what* changed {{ output }} come
out. A KCFI model, after "Enhancing Perception of Key Changes in Remote Sensing Image Change Captioning"
([arXiv 2409.12612](https://arxiv.org/abs/2409.12612)), trained with `kcfi`.

## What it is

{{ architecture }}

## How to load it

Needs {{ needs }}. With `kcfi` installed:

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
import kcfi  # registers the classes

model = AutoModelForImageTextToText.from_pretrained("{{ repo_id }}")
processor = AutoProcessor.from_pretrained("{{ repo_id }}")
pair = [Image.open("before.png"), Image.open("after.png")]
inputs = processor(images=[pair], text=[processor.prompt()], return_tensors="pt")
tokens = model.generate(**inputs, **processor.generation_tokens, max_new_tokens=64)
print(processor.post_process_image_text_to_text(tokens[:, inputs["input_ids"].shape[1] :])[0])
{{ mask }}```

or `kcfi caption before.png after.png --model {{ repo_id }}`. Without `kcfi`, leave out `import kcfi` and let
transformers run the code of this repository (read it first, and pin it with `revision=`):

```python
model = AutoModelForImageTextToText.from_pretrained("{{ repo_id }}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{{ repo_id }}", trust_remote_code=True)
```

In one call, from image files or PIL images, with the mask at their size:

```python
from transformers import pipeline

captioner = pipeline("change-captioning", model="{{ repo_id }}", trust_remote_code=True)
result = captioner(["before.png", "after.png"])
print(result["caption"], result["changed_fraction"])
{{ save_mask }}```

## Intended use and limits

For research on remote sensing change captioning, and for drafts that a person checks against the images.

{{ limits }}

## Training data

{{ data }}

## Training procedure

{{ procedure }}

## Results

{{ results }}

## Environment

{{ environment }}

## Licence

{{ license }}

## Citation

```bibtex
@article{yang2025kcfi,
  title   = {Enhancing Perception of Key Changes in Remote Sensing Image Change Captioning},
  author  = {Yang, Cong and Li, Zuchao and Jiao, Hongzan and Gao, Zhi and Zhang, Lefei},
  journal = {IEEE Transactions on Image Processing},
  volume  = {34},
  pages   = {7378--7390},
  year    = {2025},
  note    = {arXiv:2409.12612}
}
```
"""

# Lines of the examples of a model with a change detection head
MASK_EXAMPLE = """
mask_logits = model.get_image_features(inputs["pixel_values"]).mask_logits  # (1, {classes}, H, W)
[mask] = processor.post_process_masks(mask_logits, [pair[0].size[::-1]])  # class ids at the size of the images
"""
SAVE_MASK_EXAMPLE = 'result["mask"].save("mask.png")  # class ids; 255 where the model did not look\n'


class DataSet(NamedTuple):
    """A data set as a card names it: for people, on the Hub (None = it is not there), and in a sentence."""

    name: str
    hub_id: str | None
    description: str


SYNTHETIC = DataSet("synthetic scenes", None, "Drawn by `kcfi`, with five sentences and a mask per pair")
LEVIR = {
    "levir-cc": DataSet(
        "LEVIR-CC",
        "lcybuaa/LEVIR-CC",
        "Aerial pairs of 256 x 256 px at 0.5 m/px with five sentences each, without masks",
    ),
    "levir-mci": DataSet(
        "LEVIR-MCI",
        "lcybuaa/LEVIR-MCI",
        "The pairs of LEVIR-CC (256 x 256 px at 0.5 m/px, five sentences each) with masks of roads and buildings",
    ),
}


def find_data_set(dataset: str, hub_ids: Collection[str]) -> DataSet:
    """What the `dataset` of a recipe or a results file stands for; copies of LEVIR are known by their name."""
    if dataset == "synthetic":
        return SYNTHETIC
    name = Path(dataset).name
    known = [data_set for part, data_set in LEVIR.items() if part in name.lower().replace("_", "-")]
    data_set = known[0] if known else DataSet(name, None, "Pairs in the schema of LEVIR-MCI")
    return data_set._replace(hub_id=dataset) if dataset in hub_ids else data_set


def card_of_run(
    folder: Path,
    repo_id: str,
    config: KCFIConfig,
    state: dict[str, Any],
    results: Path | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The card of a run, from its folder.

    Args:
        folder: `output_dir` of the run; its recipe.yaml and results.json are read where they are there.
        repo_id: as in `model_card`.
        config: as in `model_card`.
        state: as in `model_card`.
        results: another results file than that of the folder.
        license: as in `model_card`; None: that of what the run began with, where one is known for all of it.
        tags: as in `model_card`.

    Raises:
        FileNotFoundError: `results` does not exist.
        InputError: the recipe or the results file cannot be read.
    """
    recipe, settings = read_recipe(folder)
    named = [settings[key] for key in (*ORIGINS, "dataset") if key in settings]
    if results is None and (folder / RESULTS_FILE).is_file():
        results = folder / RESULTS_FILE
    scores = None if results is None else read_results(results)
    if scores is not None:
        named.append(scores["dataset"])
    sheet = results is not None and results.with_name(SHEET_FILE).is_file()
    energy, licenses = read_energy(folder / ENERGY_FILE), licenses_of_origins(settings)
    hub_ids = list(filter(is_hub_id, named))
    license = license or shared_license(licenses)
    return model_card(repo_id, config, recipe, state, scores, hub_ids, license, tags, energy, licenses, sheet)


def read_recipe(folder: Path) -> tuple[str, dict[str, Any]]:
    """Text and values of the recipe.yaml of a run; both empty where there is none.

    Raises:
        InputError: it cannot be read.
    """
    file = folder / RECIPE_FILE
    recipe = file.read_text(encoding="utf-8") if file.is_file() else ""
    return recipe, read_yaml(file, optional=None) if recipe else {}


def licenses_of_origins(settings: dict[str, Any]) -> dict[str, str | None]:
    """What every model that a recipe begins with says of its licence, by its name there; None: nothing is known."""
    return {settings[key]: license_of(settings[key]) for key in ORIGINS if settings.get(key)}


def shared_license(licenses: Mapping[str, str | None]) -> str | None:
    """The licence that all of `licenses_of_origins` name; "other" is a different one in every card."""
    names = set(licenses.values())
    license = names.pop() if len(names) == 1 else None
    return None if license == "other" else license


def license_of(model: str) -> str | None:
    """The licence that the card of a model names: of a folder, of the Hub, or of the embedded model.

    The folder of a run without a card has the licence of what it began with. None where that is not known, or the Hub
    cannot be reached.
    """
    folder = Path(embedded_model() if model == "kcfi-tiny" else model)
    card: Path | None = folder / CARD_FILE
    if not folder.is_dir():
        try:
            card = Path(hf_hub_download(model, CARD_FILE)) if is_hub_id(model) else None
        except OSError:
            card = None
    fields = metadata_load(card) if card and card.is_file() else None
    license = (fields or {}).get("license")
    if license is None and folder.is_dir():
        license = shared_license(licenses_of_origins(read_recipe(folder)[1]))
    return str(license) if license else None


def write_tower_card(folder: Path, command: str) -> None:
    """Write the card of a tower that this project makes from random weights and drawings, with its licence."""
    text = f"---\nlicense: apache-2.0\n---\n\nMade by `{command}`, from random weights and drawn scenes alone.\n"
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


class Energy(NamedTuple):
    """What a run used, by CodeCarbon; `grams` of CO2 equivalents, with the electricity of `place`."""

    hours: float
    kwh: float
    grams: float
    place: str
    hardware: str


def read_energy(path: Path) -> Energy | None:
    """The sum over the starts of a run that came to their end, from CodeCarbon's file; None where there is none.

    Raises:
        InputError: it is no such file.
    """
    if not path.is_file():
        return None
    with refusing(f"{path} is no file of CodeCarbon"):
        with path.open(newline="", encoding="utf-8") as file:
            starts = list(csv.DictReader(file))
        if not starts:
            return None
        hours, kwh, kilograms = (
            sum(float(start[column]) for start in starts) for column in ("duration", "energy_consumed", "emissions")
        )
        places = dict.fromkeys(", ".join(filter(None, (start["region"], start["country_name"]))) for start in starts)
        devices = dict.fromkeys(start["gpu_model"] or start["cpu_model"] for start in starts)
        return Energy(hours / 3600, kwh, 1000 * kilograms, " and ".join(places), " and ".join(devices))


def read_results(path: Path) -> dict[str, Any]:
    """What `kcfi evaluate` or `kcfi score` wrote.

    Raises:
        FileNotFoundError: no such file.
        InputError: it is something else; names what is missing.
    """
    results = read_json(path)
    keys = ["model", "dataset", "split", "profile", "pairs"]
    if not isinstance(results, dict) or "mask" not in results:  # of a data set of masks there are no others
        keys += ["captions", "change_accuracy"]
    missing = [key for key in keys if not isinstance(results, dict) or key not in results]
    if missing:
        raise InputError(f"{path} is no results file of `kcfi evaluate`: it has no {', '.join(missing)}.")
    with refusing(f"{path} is no results file of `kcfi evaluate`"):  # what a card says of it can be said
        if not all(isinstance(results[key], str) for key in ("model", "dataset", "split", "profile")):
            raise ValueError("model, dataset, split and profile are names")
        drawn = results.get("synthetic", {})
        tables = [results.get("captions", {}), results["mask"]["f1"] if "mask" in results else {}, drawn]
        if not all(isinstance(table, dict) for table in tables) or not isinstance(drawn.get("pair_mix", {}), dict):
            raise ValueError("captions, the F1 of masks and what was drawn are tables by name")
        eval_results(results, [])
        _results(results, [], sheet=False)
    return dict(results)


def is_hub_id(name: str) -> bool:
    """Whether a name is `owner/name` on the Hub, and no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def model_card(
    repo_id: str,
    config: KCFIConfig,
    recipe: str,
    state: dict[str, Any],
    results: dict[str, Any] | None = None,
    hub_ids: Collection[str] = (),
    license: str | None = None,
    tags: Sequence[str] = (),
    energy: Energy | None = None,
    licenses: Mapping[str, str | None] = MappingProxyType({}),
    sheet: bool = False,
) -> str:
    """The text of a model card: YAML metadata, and what a user has to know.

    Args:
        repo_id: `owner/name` on the Hub.
        config: of the model.
        recipe: text of recipe.yaml; "" where none was saved. Folders outside the project are named by their last part.
        state: content of trainer_state.json.
        results: content of results.json; None = not evaluated.
        hub_ids: which names in recipe and results are repositories on the Hub; all others are folders of a machine.
        license: the Hub's name of a licence; None = it is not known, and not stated.
        tags: further ones than `TAGS`.
        energy: None = it was not tracked.
        licenses: of `licenses_of_origins`.
        sheet: whether the picture `SHEET_FILE` lies beside the card.
    """
    settings = _without_folders(yaml.safe_load(recipe) or {})
    data_set = find_data_set(settings["dataset"], hub_ids) if settings else None
    base_models = [settings[key] for key in ORIGINS if settings.get(key) in hub_ids]
    name = repo_id.split("/")[-1]
    scores = eval_results(results, hub_ids) if results else None
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        language="en",
        license=license,
        base_model=base_models or None,
        base_model_relation="finetune" if base_models else None,  # the Hub takes several base models for a merge
        datasets=[data_set.hub_id] if data_set and data_set.hub_id else None,
        metrics=list(dict.fromkeys(score.metric_type for score in scores)) if scores else None,
        tags=[*TAGS, *tags],
        model_name=name if scores else None,
        eval_results=scores,
        co2_eq_emissions={
            "emissions": energy.grams,
            "source": "codecarbon",
            "training_type": "fine-tuning",
            "geographical_location": energy.place,
            "hardware_used": energy.hardware,
        }
        if energy
        else None,
    )
    environment = [f"- {line.removeprefix('#').strip()}" for line in recipe.splitlines() if line.startswith("#")]
    if energy:
        environment.append(
            f"- energy, estimated by CodeCarbon for the starts that came to their end: {energy.kwh:.3g} kWh in "
            f"{energy.hours:.3g} hours on {energy.hardware}, {energy.grams:.3g} g of CO2 equivalents with the "
            f"electricity of {energy.place}"
        )
    card = ModelCard.from_template(
        card_data,
        template_str=TEMPLATE,
        name=name,
        repo_id=repo_id,
        output="and a pixel mask of *where*" if config.use_change_detection_head else "(no mask: it has no head)",
        architecture=_architecture(config, settings),
        needs=_needs(config),
        mask=MASK_EXAMPLE.format(classes=config.num_change_classes) if config.use_change_detection_head else "",
        save_mask=SAVE_MASK_EXAMPLE if config.use_change_detection_head else "",
        limits=_limits(config, settings, data_set),
        data=_training_data(settings, data_set, re.findall("^# materials: (.+)$", recipe, re.MULTILINE)),
        procedure=_procedure(settings, state),
        results=_results(results, hub_ids, sheet) if results else "Not evaluated on a test split.",
        environment="\n".join(environment) or "Not recorded.",
        license=_license(license, licenses),
    )
    return f"{card}\n"


def eval_results(results: dict[str, Any], hub_ids: Collection[str]) -> list[EvalResult]:
    """The scores of results.json as the entries of `model-index`: one data set configuration per row of pairs.

    The metric profile is the `config` of the caption metrics; a score that was not computed is left out.
    """
    data_set = find_data_set(results["dataset"], hub_ids)

    def entry(row: str, metric: str, name: str, value: float, profile: str | None = None) -> EvalResult:
        return EvalResult(
            task_type=TASK,
            task_name="Change captioning and change detection",
            dataset_type=data_set.hub_id or data_set.name.lower().replace(" ", "-"),
            dataset_name=f"{data_set.name}, {row} pairs",
            dataset_config=row,
            dataset_split=results["split"],
            metric_type=metric,
            metric_name=name if profile is None else f"{name} (profile {profile})",
            metric_value=round(value, 2),
            metric_config=profile,
        )

    entries = [
        entry(row, metric, name, scores[score], results["profile"])
        for row, scores in results.get("captions", {}).items()
        for score, (metric, name) in CAPTION_METRICS.items()
        if scores[score] is not None
    ]
    if "captions" in results:
        entries.append(entry("all", "accuracy", "changed or unchanged", results["change_accuracy"]))
    if "mask" in results:
        scored = {name: value for name, value in results["mask"]["f1"].items() if value is not None}
        entries += [entry("all", "f1", f"mask F1, {name}", value) for name, value in scored.items()]
        entries.append(entry("all", "mean_iou", "mask mean IoU", results["mask"]["mean_iou"]))
    return entries


def _without_folders(value: Any) -> Any:
    """A setting as it may be published: an absolute path tells about a machine, its last part is enough."""
    if isinstance(value, dict):
        return {key: _without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_folders(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; a number gets one decimal, None a dash."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def _architecture(config: KCFIConfig, settings: dict[str, Any]) -> str:
    def made(tower: str, origin: str) -> str:
        """How a tower was made; silent where no recipe tells."""
        if not settings:
            return ""
        source = settings.get("model") or settings.get(origin)
        trained = "trained" if settings[f"train_{tower}"] else "kept frozen"
        if tower == "language_model" and settings.get("lora"):
            adapters = ", ".join(f"{name}: {value}" for name, value in settings["lora"].items())
            trained += f" but for LoRA adapters (`{adapters}`)"
        return f"; {trained}, " + (f"from `{source}`" if source else "from random weights")

    tower, layers = config.tower, ", ".join(map(str, config.vision_feature_layers or []))
    perceiver = "none; the plain difference of both dates' features is read instead"
    if config.use_key_change_perceiver:
        perceiver = f"`flow_residual: {config.flow_residual}`, `flow_scope: {config.flow_scope}`"
    return "\n".join(
        [
            f"- Vision tower: `{config.vision_config.model_type}`, width {tower.hidden_size}, patches of "
            f"{tower.patch_size} px, images of {config.image_size} x {config.image_size} px, blocks {layers} are read"
            f"{made('vision_tower', 'vision_model')}.",
            f"- Key change perceiver: {perceiver}.",
            f"- Features for the language model: `visual_inputs: {config.visual_inputs}`, `change_context: "
            f"{config.change_context}`, `visual_token_pooling: {config.visual_token_pooling}`, `projector: "
            f"{config.projector}`.",
            f"- Change detection head: {_classes(config, settings)}.",
            f"- Language model: `{config.text_config.model_type}`, width {config.text_config.hidden_size}"
            f"{made('language_model', 'text_model')}.{_left_out(config)}",
        ]
    )


def _left_out(config: KCFIConfig) -> str:
    """What has to be fetched to load a model without its language model."""
    if not config.text_model:
        return ""
    name, revision = _without_folders(config.text_model), config.text_model_revision
    at = f" at commit `{revision}`" if revision else ""
    return f" Its weights are not here: loading fetches those of `{name}`{at}, from which they do not differ."


def _classes(config: KCFIConfig, settings: dict[str, Any]) -> str:
    """The mask's classes in words."""
    if not config.use_change_detection_head:
        return "none"
    if not settings:
        return f"{config.num_change_classes} classes, the first one the background"
    return ", ".join(CLASS_NAMES[settings["mask_classes"]])


def _limits(config: KCFIConfig, settings: dict[str, Any], data_set: DataSet | None) -> str:
    lines = [
        "- Both images must show the same ground, pixel by pixel, at the resolution of the training images. It knows "
        "the kinds of change of its training data, and no others.",
        "- Sentences are English. They may name the wrong object, place, number or direction of a change.",
    ]
    if config.use_change_detection_head:
        lines.append(f"- Masks know these classes: {_classes(config, settings)}. They miss changes and invent some.")
    if data_set == SYNTHETIC:
        seen = "drawings and on changes made in images of one date" if settings.get("materials") else "drawings"
        lines.append(f"- **This run trained on {seen}**: on real pairs the model is a demonstration.")
    lines.append("- Not for decisions about people, property or emergencies without a check by a person.")
    return "\n".join(lines)


def _training_data(settings: dict[str, Any], data_set: DataSet | None, materials: Sequence[str]) -> str:
    if data_set is None:
        return "Not recorded: the run has no recipe."
    name = data_set.name
    if data_set.hub_id:
        name = f"[{name}](https://huggingface.co/datasets/{data_set.hub_id})"
    pairs = settings.get("num_train_pairs", "all")
    text = (
        f"Split `{settings['train_split']}` of {name} ({pairs} pairs). {data_set.description}; "
        f"{settings['captions_per_pair']} of a pair's sentences per visit."
    )
    if materials:
        text += f" Ground, roofs and places were cut from {'; '.join(materials)}."
    return text


def _procedure(settings: dict[str, Any], state: dict[str, Any]) -> str:
    seen = [line for line in state["log_history"] if "pairs" in line]
    text = f"{state['global_step']} optimizer steps, {state['epoch'] or 0:.2f} epochs"
    if seen:
        text += f", {seen[-1]['pairs']} pairs and {seen[-1]['captions']} captions seen"
    if not settings:
        return f"{text}. The settings were not recorded: the run has no recipe."
    if settings["load_best_model_at_end"] and state["best_metric"] is not None:
        text += (
            f". The weights are those of step {state['best_global_step']}, the best on split "
            f"`{settings['eval_split']}` by `{settings['metric_for_best_model']}` ({state['best_metric']:.2f})"
        )
    values = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    text += ". `kcfi train recipe.yaml` repeats the run, where its data and towers are at hand, with this recipe"
    return f"{text}:\n\n```yaml\n{values}```"


def _needs(config: KCFIConfig) -> str:
    """What must be installed to load a model, with the versions that `kcfi` itself asks for."""
    packages = ["torch", "torchvision", "pillow", *["timm"] * (config.vision_config.model_type == "timm_wrapper")]
    wanted = next(line for line in requires("kcfi") or [] if re.match(r"transformers\b", line))
    return f"Python {metadata('kcfi')['Requires-Python']}, `{wanted}`, {', '.join(packages)}"


def _license(license: str | None, licenses: Mapping[str, str | None]) -> str:
    text = f"`{license}`." if license else "Not stated."
    said = [f"`{_without_folders(name)}`: {of or 'not known'}" for name, of in licenses.items()]
    return f"{text} Of what the run began with, by their cards: {', '.join(said)}." if said else text


def _results(results: dict[str, Any], hub_ids: Collection[str], sheet: bool) -> str:
    data_set = find_data_set(results["dataset"], hub_ids)
    what = f"`{Path(results['model']).name}` on {data_set.name}, split `{results['split']}`"
    mix = results.get("synthetic", {}).get("pair_mix", {})
    if mix:
        what += f" ({', '.join(f'{100 * share:.0f} % {kind}' for kind, share in mix.items() if share)})"
    parts = [f"{what}; metric profile `{results['profile']}` of `kcfi.training.scoring.metrics`; all scores x 100."]
    without = results.get("pairs_without_captions", 0)
    if without:
        parts.append(f"{without} pairs have no sentence and count in the scores of masks alone.")
    if "captions" in results:
        rows = [
            [f"{row} ({results['pairs'][row]})", *(scores[score] for score in CAPTION_METRICS)]
            for row, scores in results["captions"].items()
        ]
        parts += [
            _table(["pairs", *(name for _, name in CAPTION_METRICS.values())], rows),
            "CIDEr-D of the unchanged row is 0 by construction of its idf where these pairs share one set of "
            "sentences.",
            f"Changed or unchanged, read off the sentence: {results['change_accuracy']:.1f} % right.",
        ]
        if results["captions"]["all"]["meteor"] is None:
            parts.append("Scored without Java: no METEOR, no S_m*, and tokens of a regular expression, not PTB's.")
    if "mask" in results:
        mask = results["mask"]
        rows = [[name, *(mask[score][name] for score in MASK_METRICS)] for name in mask["f1"]]
        parts.append(_table(["mask", *MASK_METRICS.values()], rows))
        parts.append(f"Mean IoU, background included: {mask['mean_iou']:.1f}.")
    if sheet:
        parts.append(f"Some of these pairs, with what the model says of them:\n\n![pairs]({SHEET_FILE})")
    return "\n\n".join(parts)
