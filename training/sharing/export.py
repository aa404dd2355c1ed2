"""A training run -> a folder to give away: on the Hub, or embedded in the package.

`kcfi push` makes the first one: weights as they were trained, the code, the card. The second one has bf16 weights, and
no copy of the code, which the package holds:

```
python -m kcfi.training.sharing.export runs/tiny hub_configs/kcfi-tiny
```
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

import kcfi  # noqa: F401 (registers the Auto classes)
from kcfi.files import check_new_folder, move_into_place, read_json
from kcfi.modeling_kcfi.modeling_kcfi import load_tower
from kcfi.models import NO_CODE, merge_lora
from kcfi.processing import InputError, refusing
from kcfi.towers import refusals
from kcfi.training.sharing.model_card import (
    CARD_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    SHEET_FILE,
    card_of_run,
    licenses_of_origins,
    read_recipe,
    shared_license,
)

LANGUAGE_MODEL = ("model.language_model.", "lm_head.")
SETTINGS = ("config.json", "processor_config.json", "tokenizer_config.json")


def save(
    source: str | Path, output: Path, dtype: torch.dtype | str, text_model: tuple[str, str | None] | None = None
) -> None:
    """Load a model and its processor and save them, with the installed code, and nothing else of their folder.

    An adapter is merged.

    Args:
        source: folder or Hub id of the model.
        output: folder to write.
        dtype: of the weights.
        text_model: Hub id and commit of the language model, to leave it out.

    Raises:
        InputError: the weights are damaged, or the language model is not that of `text_model`.
        OSError: a file is missing.
    """
    with refusing(f"The weights in {source} cannot be read"):
        model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **NO_CODE)
    model = merge_lora(model)
    weights = model.state_dict()
    if text_model:
        check_language_model(model, *text_model)
        model.config.text_model, model.config.text_model_revision = text_model
        weights = {name: weight for name, weight in weights.items() if not name.startswith(LANGUAGE_MODEL)}
    model.save_pretrained(output, state_dict=weights)
    AutoProcessor.from_pretrained(source, **NO_CODE).save_pretrained(output)


def check_language_model(model: Any, text_model: str, revision: str | None) -> None:
    """Refuse to leave out a language model that is not, bit by bit, the one to be fetched instead.

    Raises:
        InputError: names the first weight that differs: it was trained, kept in another precision
            (`bf16_language_model`), or its vocabulary was extended.
        OSError: no such language model.
    """
    fetched: Any = load_tower(AutoModelForCausalLM, text_model, revision=revision, dtype=model.dtype)
    parts = ((fetched.base_model, model.model.language_model), (fetched.get_output_embeddings(), model.lm_head))
    for theirs, ours in parts:
        weights = theirs.state_dict()
        for name, weight in ours.state_dict().items():
            if name not in weights or not torch.equal(weight, weights[name]):
                raise InputError(
                    f"The language model cannot be left out: its {name} is not that of {text_model}. It must have "
                    "been kept frozen, in the precision that it has there, with the vocabulary that it has there."
                )


def export(source: str | Path, output: str | Path) -> None:
    """Write the weights, settings and tokenizer of a saved model; a card that is there stays.

    Args:
        source: folder that `kcfi train` wrote.
        output: folder to write; created if missing.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(source, Path(folder), torch.bfloat16)
        for file in Path(folder).iterdir():
            if file.name in SETTINGS:
                (output / file.name).write_text(_without_code(file.read_text(encoding="utf-8")), encoding="utf-8")
            elif file.suffix != ".py":
                (output / file.name).write_bytes(file.read_bytes())


def _without_code(settings: str) -> str:
    """JSON settings without `auto_map`, at any depth: it names files of code that lie beside them on the Hub."""

    def strip(values: object) -> object:
        if isinstance(values, dict):
            return {key: strip(value) for key, value in values.items() if key != "auto_map"}
        return values

    return json.dumps(strip(json.loads(settings)), indent=2, ensure_ascii=False) + "\n"


def check_run(folder: Path) -> None:
    """Refuse what is not the folder of a finished run.

    Raises:
        FileNotFoundError: there is no such folder, or a file that `kcfi train` leaves is missing.
        InputError: it is a model of another kind.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"No run {folder}: give the folder that `kcfi train` wrote, its output_dir.")
    for name in ("config.json", RECIPE_FILE, TRAINER_STATE_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}, so it is no finished run of `kcfi train`: give its output_dir, or finish it "
                "with --resume."
            )
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "kcfi":
        raise InputError(f"{folder} holds a model of type {kind!r}, not 'kcfi'.")


def check_license(folder: Path, license: str | None) -> None:
    """Refuse to push a run under a licence that nobody has named.

    Raises:
        InputError: none is given, and what the run began with does not agree on one; says what each of it says.
    """
    licenses = licenses_of_origins(read_recipe(folder)[1])
    if license is None and shared_license(licenses) is None:
        said = "; ".join(f"{name}: {of or 'not known here'}" for name, of in licenses.items())
        raise InputError(
            f"Give --license, the licence of the weights: it does not follow from what the run began with ({said})."
        )


def push(
    folder: Path,
    repo_id: str,
    results: Path | None = None,
    private: bool = False,
    license: str | None = None,
    dry_run: Path | None = None,
    text_model: str | None = None,
) -> str:
    """Upload a finished run: weights, code, processor, generation settings and card; nothing that training needs.

    Args:
        folder: `output_dir` of the run.
        repo_id: `owner/name` of the model on the Hub; created if missing.
        results: results file of `kcfi evaluate` for the card (None: results.json of `folder`, if there is one).
        private: whether a new repository is private.
        license: the Hub's name of the weights' licence (None: that of what the run began with, where all agree).
        dry_run: new folder to write, exactly as it would be uploaded, instead of uploading it.
        text_model: Hub id of the language model, to leave its weights out.

    Returns:
        Address of the commit, or the folder of a dry run.

    Raises:
        FileNotFoundError: no finished run, or no results file.
        FileExistsError: `dry_run` is not empty.
        InputError: not a KCFI model, an invalid `repo_id`, a file that cannot be read, a language model that cannot be
            left out, or a licence that is neither given nor known.
        OSError: the Hub cannot be reached, or refuses.
    """
    with refusals():
        validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise InputError(f"{repo_id!r} names no owner: write owner/name, for example me/{repo_id}.")
    if text_model and Path(text_model).exists():
        raise InputError(f"{text_model} is a folder of this machine, where nobody else finds it: give its Hub id.")
    if dry_run:
        check_new_folder(dry_run)
    check_run(folder)
    state = read_json(folder / TRAINER_STATE_NAME)
    with refusing(f"{folder / CONFIG_NAME} cannot be read"):
        config = AutoConfig.from_pretrained(folder, **NO_CODE)
    check_license(folder, license)
    reference = None
    if text_model:
        recipe = read_recipe(folder)[1]
        revision = recipe.get("text_model_revision") if recipe.get("text_model") == text_model else None
        file = cached_file(text_model, CONFIG_NAME, revision=revision)
        reference = text_model, extract_commit_hash(file, None)
        config.text_model, config.text_model_revision = reference
    card = card_of_run(folder, repo_id, config, state, results, license=license)

    if dry_run:
        dry_run.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dry_run.parent if dry_run else None) as temporary:
        content = Path(temporary) / "content"
        save(folder, content, "auto", reference)
        (content / CARD_FILE).write_text(card, encoding="utf-8")
        sheet = (results or folder / RESULTS_FILE).with_name(SHEET_FILE)
        if sheet.is_file() and SHEET_FILE in card:
            shutil.copy(sheet, content)
        if dry_run:
            move_into_place(content, dry_run)
            return str(dry_run)
        hub = HfApi()
        try:
            hub.create_repo(repo_id, private=private or None, exist_ok=True)  # None: what the owner has set
            commit = hub.upload_folder(
                repo_id=repo_id,
                folder_path=content,
                commit_message="Push with kcfi",
                delete_patterns="model*.safetensors*",  # of an earlier push that was cut into other shards
            )
        except HTTPError as error:
            raise ConnectionError(f"Cannot push to {repo_id} at {hub.endpoint}: {error}") from error
    return str(commit.commit_url)


def main(argv: list[str] | None = None) -> None:
    """Command line: source, output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder that `kcfi train` wrote")
    parser.add_argument("output", help="folder to write")
    options = parser.parse_args(argv)
    export(options.source, options.output)


if __name__ == "__main__":
    main()
