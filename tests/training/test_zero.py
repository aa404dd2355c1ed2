import json
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from kcfi.training.arguments import parse_recipe
from kcfi.training.zero import SETTINGS, find_settings, require_deepspeed
from tests.training.conftest import needs_deepspeed

NAMES = ["zero2", "zero2_offload", "zero3", "zero3_offload"]
LAUNCH = SETTINGS.parent / "launch"
PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"


def test_settings_are_found_by_name_and_by_path(tmp_path):
    assert sorted(path.stem for path in SETTINGS.iterdir()) == NAMES
    assert find_settings("zero2") == SETTINGS / "zero2.json"
    own = tmp_path / "own.json"
    own.write_text("{}")
    assert find_settings(str(own)) == own
    with pytest.raises(ValueError, match=r"No DeepSpeed settings zero4: give .* packaged ones: zero2, zero2_"):
        find_settings("zero4")


@pytest.mark.parametrize("name", NAMES)
def test_packaged_settings_follow_the_recipe_and_save_whole_weights(name):
    settings = json.loads(find_settings(name).read_text())
    zero = settings["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (zero["stage"] == 3)
    assert ("offload_optimizer" in zero) == ("zero_force_ds_cpu_optimizer" in settings) == name.endswith("offload")
    follow = ["gradient_clipping", "gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu"]
    assert {settings[field] for field in follow} == {"auto"}
    assert settings["bf16"] == settings["fp16"] == {"enabled": "auto"}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # what an import meets where it is not installed
    with pytest.raises(ValueError, match=r'DeepSpeed is not installed: `pip install "kcfi\[deepspeed\]"`'):
        require_deepspeed(use_cpu=True)


@needs_deepspeed
def test_a_missing_launcher_is_named_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match=r"DeepSpeed needs a launcher.*torchrun --nproc_per_node 1"):
        parse_recipe("debug", ["--deepspeed", "zero2", "--use_cpu", "--output_dir", str(tmp_path)])


def test_a_recipe_with_deepspeed_is_read_without_a_launcher_where_another_process_trains(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    options = ["--deepspeed", "zero2", "--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path)]
    recipe = parse_recipe("debug", options, starts=False)
    assert recipe.training.deepspeed == recipe.values["deepspeed"] == "zero2"


@needs_deepspeed
def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"missing: c\+\+, ninja.*apt install g\+\+ python3-dev"):
        require_deepspeed(use_cpu=True)


@pytest.mark.parametrize(("machines", "devices"), [(1, 4), (2, 8)])
def test_accelerate_reads_the_launch_files(machines, devices):
    config = load_config_from_file(str(LAUNCH / f"accelerate_{machines}x{devices}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, machines * devices)
    assert (config.distributed_type, config.mixed_precision) == ("MULTI_GPU", "no")


def test_commands_of_the_page_about_clusters_name_what_exists(tmp_path):
    commands = [line[2:].split() for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("$ ")]
    assert len(commands) == 7
    for words in commands:
        assert all((LAUNCH / word).is_file() for word in words if word.endswith((".sh", "x4.yaml", "x8.yaml")))
        recipe, *options = words[words.index("train" if "train" in words else "runs/paper") + 1 :]
        if recipe == "paper":  # the other one resumes a run of it
            parse_recipe(recipe, [*options, "--bf16", "false", "--use_cpu", "--output_dir", str(tmp_path)])
