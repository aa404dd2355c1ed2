import json
import os
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TimmWrapperConfig, TimmWrapperModel

from kcfi import Describer, load
from kcfi.processing import InputError
from kcfi.training import train
from kcfi.training.arguments import ModelArguments, parse_recipe
from kcfi.training.checkpoints import MARKER, complete_checkpoints, mark
from kcfi.training.collator import KCFICollator
from kcfi.training.data.shards import write_shards
from kcfi.training.synthetic.dataset import SyntheticDataset
from kcfi.training.trainer import KCFITrainer
from tests.training.conftest import needs_deepspeed


def test_a_run_with_real_materials_names_their_sources_in_its_recipe(recipe, library, tmp_path):
    mix = ["--pair_mix.composed", "1", "--pair_mix.single_date", "1"]
    options = ["--materials", str(library), *mix, "--max_steps", "1", "--eval_strategy", "no"]
    train.main([str(recipe), *options])
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "# materials: made up (CC0-1.0)\n" in text
    values = yaml.safe_load(text)
    assert values["materials"] == str(library) and values["pair_mix"] == {"composed": 1, "single_date": 1}


def test_materials_for_a_folder_of_pairs_are_refused(recipe, library, tmp_path):
    with pytest.raises(ValueError, match="materials and pair_mix are for dataset 'synthetic'"):
        train.main([str(recipe), "--dataset", str(tmp_path), "--materials", str(library)])


def log_of(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [(line["step"], line["loss"]) for line in state["log_history"] if "loss" in line]


def test_a_recipe_trains_and_leaves_a_model_that_the_auto_classes_load(recipe, tmp_path):
    train.main([str(recipe), "--seed", "7"])
    folder = tmp_path / "run"
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    pair = SyntheticDataset(1, split="test")[0]
    inputs = processor(
        images=[[pair["image_before"], pair["image_after"]]], text=[processor.prompt()], return_tensors="pt"
    )
    assert model(**inputs).mask_logits.shape == (1, 3, 32, 32)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    assert not model.generation_config.do_sample

    text = (folder / "recipe.yaml").read_text()
    assert text.startswith("# kcfi ") and "torch" in text.splitlines()[0] and "git revision" in text.splitlines()[1]
    assert yaml.safe_load(text)["seed"] == 7


def test_a_run_keeps_to_the_commits_that_it_began_with(recipe, hub_text_model, tmp_path):
    """Failed before: recipe.yaml named no commit, and a resumed run took what the Hub held by then."""
    name, commit = hub_text_model
    options = ["--text_model", name, "--max_steps", "2", "--eval_strategy", "no", "--save_steps", "1"]
    options += ["--save_strategy", "steps"]
    train.main([str(recipe), *options])
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert saved["text_model_revision"] == commit and "vision_model_revision" not in saved

    main = tmp_path / "hub" / "models--me--lm" / "refs" / "main"
    main.write_text("f" * 40)  # a newer one, which is not here
    (tmp_path / "run" / "complete.json").unlink()
    train.main([str(recipe), *options, "--text_model_revision", "main", "--resume"])  # its name does not count
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text()) == saved
    with pytest.raises(OSError, match="text_model: cannot load 'me/lm' at its newest commit"):
        train.main([str(recipe), *options, "--output_dir", str(tmp_path / "new")])


def test_a_tag_stands_for_its_commit_in_the_recipe(recipe, hub_text_model, tmp_path):
    name, commit = hub_text_model
    (tmp_path / "hub" / "models--me--lm" / "refs" / "v1").write_text(commit)
    parsed = parse_recipe(recipe, ["--text_model", name, "--text_model_revision", "v1"])
    train.pin_models(parsed)
    assert parsed.model.text_model_revision == parsed.values["text_model_revision"] == commit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text_model_revision", "v1"], "text_model_revision is v1, but text_model is .*, no model of the Hub"),
        (["--vision_model_revision", "v1"], "vision_model_revision is v1, but vision_model is not given"),
        (["--dataset_revision", "v1"], "dataset_revision v1 is for a data set on the Hub; synthetic is none"),
    ],
)
def test_a_revision_of_what_is_not_on_the_hub_is_refused(recipe, options, message):
    with pytest.raises(InputError, match=message):
        train.main([str(recipe), *options])


def test_a_recipe_streams(recipe, root, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_shards(root, tmp_path / "shards")
    options = ["--dataset", str(tmp_path / "shards"), "--streaming", "true"]
    with pytest.raises(InputError, match="a streamed train_dataset has no length; say how many steps"):
        train.main([str(recipe), *options])
    steps = [f"--{what}_strategy=steps" for what in ("eval", "save")] + ["--eval_steps=2", "--save_steps=2"]
    train.main([str(recipe), *options, "--max_steps", "2", *steps])
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert log[1]["pairs"] == 4 and "eval_mask_f1" in log[2]


def contents(folder):
    """Every file that a run leaves, but for what it measured and the names of folders."""
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"] = [
        {name: value for name, value in line.items() if not any(time in name for time in ("second", "memory", "time"))}
        for line in state["log_history"]
    ]
    state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
    skipped = ("recipe.yaml", "training_args.bin", "trainer_state.json", MARKER)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in skipped]
    return state, {path.relative_to(folder): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_losses_scores_checkpoints_captions_and_masks(recipe, tmp_path, workers):
    options = [str(recipe), "--augment", "true", "--dataloader_num_workers", str(workers), "--report_to", "none"]
    options += ["--train_language_model", "true"]
    found = []
    for name in ("one", "two"):
        torch.manual_seed(hash(name) % 1000)  # whatever this process did before
        train.main([*options, "--output_dir", str(tmp_path / name)])
        found.append(contents(tmp_path / name))
        model, processor = load(str(tmp_path / name))
        pairs = [SyntheticDataset(2, split="test")[index] for index in range(2)]
        reports = Describer(model, processor).describe_pairs([(p["image_before"], p["image_after"]) for p in pairs])
        found[-1] += ([report.caption for report in reports], [report.mask.tobytes() for report in reports])
    assert found[0] == found[1]
    names = {file.name for file in found[0][1]}
    assert names >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "kcfi_state.json"}


def test_the_saved_recipe_repeats_the_run(recipe, tmp_path):
    train.main([str(recipe), "--dwa", "window"])
    again = tmp_path / "again"
    train.main([str(tmp_path / "run" / "recipe.yaml"), "--output_dir", str(again)])
    assert log_of(again) == log_of(tmp_path / "run")


def kill_and_resume(command, folder):
    """Train in a process that is killed behind its first checkpoint, and go on in another."""
    command = [*command, "--output_dir", str(folder)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not complete_checkpoints(folder):
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    run.kill()
    run.wait()
    subprocess.run([*command, "--resume"], check=True)


@pytest.mark.slow
def test_a_killed_run_resumes_in_a_new_process_with_the_same_losses(recipe, tmp_path):
    options = ["--save_strategy", "steps", "--save_steps", "3", "--load_best_model_at_end", "false"]
    command = [sys.executable, "-m", "kcfi.training.train", str(recipe), "--eval_strategy", "no", *options]
    full, killed = tmp_path / "full", tmp_path / "killed"
    subprocess.run([*command, "--output_dir", str(full)], check=True)
    kill_and_resume(command, killed)
    assert log_of(killed) == log_of(full)


@pytest.fixture
def second(recipe, tmp_path):
    """A second stage, behind one of the recipe."""
    train.main([str(recipe), "--eval_strategy", "no", "--save_strategy", "no", "--output_dir", str(tmp_path / "one")])
    values = {"base": recipe.name, "model": str(tmp_path / "one"), "objective": "scst", "dwa": "none"}
    values |= dict.fromkeys(("vision_config", "text_model", "model_settings"))
    values |= {"train_language_model": True, "num_train_epochs": 4, "eval_strategy": "no"}
    values |= {"save_strategy": "steps", "save_steps": 3}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "second.yaml"


def rewards_of(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [[line["reward"], line["greedy_reward"]] for line in state["log_history"] if "reward" in line]


@pytest.mark.slow
def test_two_ranks_draw_and_learn_like_one(launched, second, tmp_path):
    train.main([str(second), "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "whole")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "kcfi_cli", "train"]
    command = [*launcher, str(second), "--output_dir", str(tmp_path / "ranks")]
    done = subprocess.run(command, capture_output=True, text=True, env=launched, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert log_of(tmp_path / "ranks") == [
        (step, pytest.approx(loss, rel=1e-3)) for step, loss in log_of(tmp_path / "whole")
    ]
    assert rewards_of(tmp_path / "ranks") == [pytest.approx(line, rel=1e-4) for line in rewards_of(tmp_path / "whole")]


@pytest.mark.slow
def test_a_killed_second_stage_resumes_with_the_same_captions_and_losses(second, tmp_path):
    command = [sys.executable, "-m", "kcfi.training.train", str(second)]
    full, killed = tmp_path / "full", tmp_path / "killed"
    subprocess.run([*command, "--output_dir", str(full)], check=True)
    kill_and_resume(command, killed)
    assert len(log_of(full)) == len(rewards_of(full)) == 16
    assert log_of(killed) == log_of(full) and rewards_of(killed) == rewards_of(full)


def test_captions_are_drawn_from_a_finished_model_alone(recipe):
    with pytest.raises(InputError, match="objective=scst goes on from captions that a model can write: give `model`"):
        train.main([str(recipe), "--objective", "scst", "--dwa", "none"])


def test_a_recipe_takes_whole_scenes_by_its_seed_and_refuses_pairs_without_numbers(recipe, root, tmp_path):
    options = ["--dataset", str(root), "--crops_per_scene", "16", "--num_train_pairs", "1", "--max_steps", "1"]
    with pytest.raises(InputError, match=r"a\.png: its name does not end in the number of a crop"):
        train.main([str(recipe), *options, "--eval_strategy", "no"])
    captions = root / "LevirCCcaptions.json"
    captions.write_text(captions.read_text().replace("a.png", "1.png").replace("b.png", "2.png"))
    for old, new in (("a.png", "1.png"), ("b.png", "2.png")):
        for kind in ("A", "B", "label"):
            (root / "images" / "train" / kind / old).rename(root / "images" / "train" / kind / new)
    train.main([str(recipe), *options, "--eval_strategy", "no"])
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["pairs"] == 1


@pytest.fixture
def submit(launched, tmp_path):
    """Run slurm.sh as SLURM would on one machine with two devices; `srun` and `scontrol` are stand-ins."""
    for name, command in (
        ("srun", '[ "$1 $2" = "--cpus-per-task 4" ] && shift 2 && exec "$@"'),
        ("scontrol", "echo localhost"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{command}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_PER_TASK": "4"}
    job |= {"SLURM_JOB_ID": str(os.getpid()), "PATH": f"{tmp_path}:{launched['PATH']}"}
    script = Path(train.__file__).parent / "launch" / "slurm.sh"

    def run(*arguments):
        done = subprocess.run(
            ["bash", script, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**launched, **job},
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]

    return run


@pytest.mark.slow
@needs_deepspeed
def test_slurm_trains_new_towers_under_zero3_and_goes_on_when_submitted_again(submit, recipe, tmp_path):
    best = ["--metric_for_best_model", "loss", "--greater_is_better", "true"]  # the first checkpoint, not the last
    options = ["--captions_per_pair", "2", *best]
    one, run = tmp_path / "one", tmp_path / "run"
    train.main([str(recipe), *options, "--per_device_train_batch_size", "4", "--output_dir", str(one)])
    submit(run, recipe, *options, "--deepspeed", "zero3")
    log = log_of(run)
    assert log == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in log_of(one)]
    assert yaml.safe_load((run / "recipe.yaml").read_text())["deepspeed"] == "zero3"

    def weights(folder):
        return load_file(folder / "model.safetensors")

    first, last = (weights(run / f"checkpoint-{step}") for step in (2, 4))
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert weights(run).keys() == first.keys() == weights(one).keys()
    for name, weight in weights(run).items():
        assert torch.equal(weight, first[name]), name

    shutil.rmtree(run / "checkpoint-4")  # killed before it was written
    (run / MARKER).unlink()
    submit(run, recipe, *options, "--deepspeed", "zero3")
    assert log_of(run) == log


@pytest.mark.slow
@needs_deepspeed
def test_zero3_saves_an_adapter_and_the_model_it_stands_on(submit, recipe, tmp_path):
    options = ["--lora.r", "4", "--eval_strategy", "no", "--max_steps", "2"]
    one, run = tmp_path / "one", tmp_path / "run"
    train.main([str(recipe), *options, "--per_device_train_batch_size", "4", "--output_dir", str(one)])
    submit(run, recipe, *options, "--deepspeed", "zero3")
    assert log_of(run) == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in log_of(one)]
    for name, change in (("model", 0), ("adapter_model", 1e-3)):
        whole, gathered = (load_file(folder / f"{name}.safetensors") for folder in (one, run))
        assert whole.keys() == gathered.keys()
        for key, weight in whole.items():
            torch.testing.assert_close(gathered[key], weight, rtol=0, atol=change, msg=key)


@pytest.mark.slow
def test_accelerate_starts_one_process_per_device_of_its_launch_file(launched, recipe, tmp_path):
    config = Path(train.__file__).parent / "launch" / "accelerate_1x4.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    options = ["--per_device_train_batch_size", "1", "--max_steps", "1", "--eval_strategy", "no"]
    command = [*launcher, "-m", "kcfi_cli", "train", str(recipe), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=launched, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "kcfi_state.json").read_text())
    assert (state["order"]["processes"], state["pairs"]) == (4, 4)


def git(folder, *command):
    settings = ("-c", "user.name=me", "-c", "user.email=me@here")
    return subprocess.run(["git", *settings, *command], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_revision_is_that_of_our_own_repository_and_of_no_other_around_it(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").touch()
    git(tmp_path, "init")
    git(tmp_path, "add", "theirs.py")
    git(tmp_path, "commit", "-m", "theirs")
    installed = tmp_path / ".venv" / "kcfi" / "training" / "train.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(train, "__file__", str(installed))
    assert train.git_revision() == "unknown"
    git(tmp_path, "add", str(installed))
    git(tmp_path, "commit", "-m", "ours")
    assert train.git_revision() == git(tmp_path, "rev-parse", "--short", "HEAD").strip()


@pytest.mark.parametrize("kind", [InputError, RuntimeError])
def test_a_run_that_fails_leaves_its_traceback_in_its_folder(recipe, tmp_path, monkeypatch, kind):
    def fails(*_):
        raise kind("of the last step")

    monkeypatch.setattr(KCFITrainer, "training_step", fails)
    file = tmp_path / "run" / "error.txt"
    with pytest.raises(kind, match="of the last step") as raised:
        train.main([str(recipe)])
    assert raised.value.__notes__ == [f"The traceback is in {file}."]
    text = file.read_text()
    assert text.startswith("Traceback") and "trainer.train(" in text and f"{kind.__name__}: of the last step" in text
    monkeypatch.undo()
    train.main([str(recipe), "--max_steps", "1", "--eval_strategy", "no"])
    assert not file.exists()  # of the start before


def test_bad_input_before_there_is_a_run_leaves_no_folder_and_a_refused_start_no_file(recipe, tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        train.main([str(recipe), "--dataset", str(tmp_path / "nowhere")])
    assert not (tmp_path / "run").exists() and not hasattr(raised.value, "__notes__")
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    mark(tmp_path / "run" / "checkpoint-5", 5, [])
    with pytest.raises(InputError, match="holds a run"):
        train.main([str(recipe)])
    assert not (tmp_path / "run" / "error.txt").exists()


def test_each_rank_has_a_file_of_its_own(tmp_path):
    with pytest.raises(RuntimeError), train.error_kept(tmp_path / "run", rank=3):
        raise RuntimeError
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["error_rank3.txt"]


def test_another_number_of_loader_workers_is_no_other_recipe(recipe, tmp_path):
    train.save_recipe(parse_recipe(recipe), tmp_path / "run")
    train.check_same_recipe(parse_recipe(recipe, ["--dataloader_num_workers", "2"]), tmp_path / "run")


def test_a_field_that_a_run_did_not_know_had_its_default(recipe, tmp_path):
    parsed = parse_recipe(recipe)
    train.save_recipe(parsed, tmp_path / "run")
    file = tmp_path / "run" / "recipe.yaml"
    values = yaml.safe_load(file.read_text())
    del values["augment"], values["max_unreadable"]
    file.write_text(yaml.safe_dump(values))
    train.check_same_recipe(parse_recipe(file), tmp_path / "run")
    with pytest.raises(ValueError, match=r"other settings \(augment: False -> True\)"):
        train.check_same_recipe(parse_recipe(recipe, ["--augment", "true"]), tmp_path / "run")
    train.save_recipe(parse_recipe(recipe, ["--augment", "true"]), tmp_path / "run")
    with pytest.raises(ValueError, match=r"other settings \(augment: True -> False\)"):
        train.check_same_recipe(parsed, tmp_path / "run")


def test_the_help_shows_commands_without_the_fences_of_the_docstring(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert "kcfi train debug " in text and "`" * 3 not in text


def test_a_second_run_into_the_same_folder_is_refused(recipe, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    mark(checkpoint, 5, [])
    with pytest.raises(ValueError, match="holds a run: continue it with --resume"):
        train.main([str(recipe)])


@pytest.mark.parametrize("name", ["checkpoint-5", "model.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("resume", [False, True])
def test_what_has_no_marker_is_not_overwritten_but_a_run_killed_before_it_saved_begins_anew(tmp_path, name, resume):
    (tmp_path / "recipe.yaml").touch()
    assert train.find_checkpoint(tmp_path, resume=False) is None
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"holds checkpoints or weights without a marker, like {name}: .* or delete"):
        train.find_checkpoint(tmp_path, resume=resume)


def test_a_run_is_not_resumed_with_other_settings(recipe, tmp_path):
    output_dir = tmp_path / "run"
    command = [str(recipe), "--output_dir", str(output_dir), "--eval_strategy", "no", "--save_steps", "1"]
    command += ["--save_strategy", "steps", "--load_best_model_at_end", "false"]
    train.main([*command, "--max_steps", "1"])
    saved = (output_dir / "recipe.yaml").read_text()
    with pytest.raises(ValueError, match=r"other settings \(seed: 42 -> 7; max_steps: 1 -> 2\).*recipe.yaml --resume"):
        train.main([*command, "--max_steps", "2", "--seed", "7", "--resume"])
    assert (output_dir / "recipe.yaml").read_text() == saved
    train.main([str(output_dir / "recipe.yaml"), "--resume"])  # its own recipe is always accepted
    train.main([*command, "--max_steps", "1", "--output_dir", f"{output_dir}/", "--resume"])  # and its folder may move


@pytest.mark.parametrize(
    "option",
    [
        ["--report_to", "none"],
        ["--report_to", "tensorboard", "wandb"],
        ["--lora.r", "4"],
        ["--lr_scheduler_kwargs", "{}"],
        ["--label_names", "labels"],
    ],
)
def test_every_saved_setting_can_be_read_again(recipe, tmp_path, option):
    values = parse_recipe(recipe, option).values
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(values))
    assert parse_recipe(tmp_path / "again.yaml").values == values


def test_pooled_visual_tokens_have_as_many_placeholders(text_model, vision):
    args = ModelArguments(vision_config=vision, text_model=str(text_model), model_settings={"visual_token_pooling": 2})
    model, processor = train.build_model(args)
    assert (processor.num_patches, model.config.num_patches) == (4, 16)
    batch = KCFICollator(processor)([SyntheticDataset(2)[1]])
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4
    [features] = model(batch["input_ids"], batch["pixel_values"]).image_outputs.pooler_output
    assert len(features) == 4


def test_a_random_tower_with_batch_norms_is_refused(text_model):
    size = {"img_size": 32, "depth": 2, "embed_dim": 16, "num_heads": 2}
    tower = {"model_type": "timm_wrapper", "architecture": "xcit_nano_12_p8_224", "model_args": size}
    with pytest.raises(ValueError, match=r"batch norms.* needs pretrained weights"):
        train.build_model(ModelArguments(vision_config=tower, text_model=str(text_model)))


def test_a_timm_tower_brings_its_own_normalisation(text_model, tmp_path):
    size = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2}
    statistics = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "input_size": [3, 32, 32]}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=size, pretrained_cfg=statistics)
    TimmWrapperModel(config).save_pretrained(tmp_path)
    model, processor = train.build_model(ModelArguments(vision_model=str(tmp_path), text_model=str(text_model)))
    assert (list(processor.image_processor.image_mean), processor.patch_size) == ([0.4, 0.5, 0.6], 8)
    assert list(processor.image_processor.image_std) == [0.1, 0.2, 0.3]
    assert model.config.num_patches == processor.num_patches == 16


def test_a_finished_run_is_left_alone(recipe, tmp_path, capsys):
    options = [
        str(recipe),
        "--max_steps",
        "2",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--eval_strategy",
        "no",
    ]
    train.main(options)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    train.main([*options, "--resume"])
    assert capsys.readouterr().out.endswith("run is finished: there is nothing to resume.\n")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == times


def test_nothing_to_resume_is_said(recipe):
    with pytest.raises(ValueError, match="Nothing to resume"):
        train.main([str(recipe), "--resume"])


def test_classes_of_masks_and_model_must_agree(recipe):
    with pytest.raises(ValueError, match=r"mask_classes=change has 2 classes, the model num_change_classes=3"):
        train.main([str(recipe), "--mask_classes", "change"])


def test_an_unknown_model_setting_names_the_nearest(recipe):
    with pytest.raises(ValueError, match="'flow_residul': did you mean 'flow_residual'"):
        train.main([str(recipe), "--model_settings.flow_residul", "self"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text_model": "folder"},
        {"text_model": "folder", "vision_model": "folder", "vision_config": {"model_type": "vit"}},
        {"model": "folder", "text_model": "folder"},
        {"model": "folder", "model_settings": {"flow_residual": "cross"}},
    ],
    ids=str,
)
def test_a_model_is_either_finished_or_made_of_two_towers(settings):
    with pytest.raises(ValueError, match=r"Give `model`|is a finished model"):
        train.build_model(ModelArguments(**settings))


def test_a_model_of_pretrained_towers_keeps_their_weights_and_pixels(tmp_path, text_model, vision):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    tower = ViTModel(ViTConfig(**vision), add_pooling_layer=False)
    tower.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    arguments = ModelArguments(
        vision_model=str(tmp_path), text_model=str(text_model), model_settings={"image_size": 24}, shortest_edge=32
    )
    model, processor = train.build_model(arguments)
    for name, weight in model.model.vision_tower.state_dict().items():
        assert torch.equal(weight, tower.state_dict()[name]), name
    pixels = processor.image_processor
    assert [*pixels.image_mean, *pixels.image_std] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert pixels.do_center_crop and processor.num_patches == 9 == model.config.num_patches
    assert model.config.image_token_id == processor.image_token_id


def test_training_goes_on_from_a_finished_model_in_fp32(tmp_path, model, processor):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = train.build_model(ModelArguments(model=str(tmp_path)))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded_processor.encode_prompt() == processor.encode_prompt()
