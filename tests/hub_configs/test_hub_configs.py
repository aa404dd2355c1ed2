"""The configs without weights: what their cards say is what the config is, and what the commands of the card make."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCardData, metadata_load
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModel, ViTImageProcessor

import kcfi
from kcfi import KCFIConfig, KCFIForConditionalGeneration
from kcfi.training.arguments import parse_recipe
from tests.test_towers import save_text

ROOT = Path(kcfi.embedded_model()).parent
NAMES = ["kcfi-dinov2s-smollm2-135m", "kcfi-vitl14-qwen2-1.5b", "kcfi-vitb16-qwen2.5-0.5b"]
PARTS = ["vision tower", "key change perceiver", "projector", "change detection head", "language model"]


@pytest.fixture(params=NAMES)
def folder(request):
    return ROOT / request.param


@pytest.fixture
def card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def base_model(folder):
    """Names of the two towers."""
    return metadata_load(folder / "README.md")["base_model"]


def with_settings(config: KCFIConfig, settings: dict) -> dict:
    """What the towers and the `<image>` token of a config become with these settings, and all others' defaults."""
    towers = {name: getattr(config, name).to_dict() for name in ("vision_config", "text_config")}
    made = KCFIConfig(**towers, image_token_id=config.image_token_id, architectures=config.architectures, **settings)
    return made.to_dict()


def test_no_other_folder_is_without_a_test():
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and path.name.startswith("kcfi-")} == {
        "kcfi-tiny",
        *NAMES,
    }


def test_the_folder_holds_a_config_and_a_card_and_no_trace_of_a_machine(folder):
    assert {path.name for path in folder.iterdir()} == {"config.json", "README.md"}
    assert not re.search("auto_map|name_or_path", (folder / "config.json").read_text(encoding="utf-8"))


def test_the_card_states_the_parameters_of_every_part(folder, card):
    with torch.device("meta"):
        model = KCFIForConditionalGeneration(KCFIConfig.from_pretrained(folder))
    base = model.model
    parts = [
        base.vision_tower,
        base.key_change_perceiver,
        base.projector,
        base.change_detection_head,
        base.language_model,
    ]
    counted = {name: sum(p.numel() for p in part.parameters()) for name, part in zip(PARTS, parts, strict=True)}
    counted["total"] = sum(parameter.numel() for parameter in model.parameters())  # the output layer is tied
    stated = {name: int(count.replace(",", "")) for name, count in re.findall(r"\| ([a-z ]+) \| ([\d,]+) \|", card)}
    assert stated == counted
    assert counted["total"] == sum(counted[name] for name in PARTS)


def test_the_metadata_reads_back_through_the_hubs_own_class(folder, base_model):
    metadata = metadata_load(folder / "README.md")
    assert ModelCardData(**metadata).to_dict() == metadata
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "image-text-to-text")
    assert len(base_model) == 2
    for repository in base_model:
        validate_repo_id(repository)


def test_the_command_of_the_card_makes_this_config_of_its_base_models(folder, card, base_model, tmp_path):
    [command] = re.findall(r"^\$ kcfi train (.*)", card.replace("\\\n", ""), re.MULTILINE)
    name, *options = shlex.split(command, comments=True)
    recipe = parse_recipe(name, [*options, "--use_cpu", "--output_dir", str(tmp_path)])
    assert [recipe.model.vision_model, recipe.model.text_model] == base_model
    config = KCFIConfig.from_pretrained(folder)
    assert with_settings(config, recipe.model.model_settings) == config.to_dict()


def test_the_python_example_of_the_card_runs_on_tiny_towers_and_has_the_settings_of_its_command(
    folder, card, base_model, tmp_path
):
    config = KCFIConfig.from_pretrained(folder)
    tower = AutoConfig.for_model(**{**config.vision_config.to_dict(), "hidden_size": 16, "num_attention_heads": 2})
    AutoModel.from_config(tower).save_pretrained(tmp_path / "vision")
    ViTImageProcessor().save_pretrained(tmp_path / "vision")
    towers = [str(tmp_path / "vision"), save_text("qwen2", tmp_path / "text")]
    [example] = re.findall(r"```python\n(.*?)```", card, re.S)
    for name, tiny in zip(base_model, towers, strict=True):
        example = example.replace(f'"{name}"', repr(tiny))
    made: dict[str, Any] = {}
    exec(compile(example, str(folder), "exec"), made)

    for setting in KCFIConfig.__annotations__.keys() - {"vision_config", "text_config", "image_token_id"}:
        assert getattr(made["model"].config, setting) == getattr(config, setting), setting
    [name] = re.findall(r"^\$ kcfi train (\w+)", card, re.MULTILINE)
    shortest_edge = parse_recipe(name, ["--use_cpu", "--output_dir", str(tmp_path)]).model.shortest_edge
    assert made["processor"].image_processor.size.get("shortest_edge") == shortest_edge
