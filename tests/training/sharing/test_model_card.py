"""The card tells what the run did, its metadata is what the Hub reads, and the pushed folder is a model."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.trainer import TRAINER_STATE_NAME

from kcfi import KCFIForConditionalGeneration, KCFIProcessor
from kcfi.processing import InputError
from kcfi.training.arguments import KCFITrainingArguments, parse_recipe
from kcfi.training.collator import KCFICollator
from kcfi.training.scoring.metrics import CAPTION_SCORES, MaskScores, results
from kcfi.training.sharing.export import push
from kcfi.training.sharing.model_card import (
    CAPTION_METRICS,
    MASK_METRICS,
    card_of_run,
    eval_results,
    find_data_set,
    license_of,
    model_card,
    read_results,
)
from kcfi.training.train import save_recipe
from kcfi.training.trainer import KCFITrainer

TOWERS = ["google/vit-large-patch16-224-in21k", "Qwen/Qwen2-1.5B-Instruct"]  # of the recipe "paper"
HUB_IDS = [*TOWERS, "lcybuaa/LEVIR-MCI"]
STATE = {
    "global_step": 12,
    "epoch": 1.5,
    "best_metric": 61.25,
    "best_global_step": 8,
    "log_history": [{"pairs": 48, "captions": 96, "loss": 1.0}, {"eval_s_m": 61.25}],
}


@pytest.fixture(scope="module")
def scores():
    """What `kcfi evaluate` writes, of four pairs, without Java."""
    masks = MaskScores("change")
    masks.update(*([[0, 0, 1, 1]], [[0, 1, 1, 1]]))
    references = [["there is no difference ."] * 2] * 2 + [["a house appears .", "a villa is built ."]] * 2
    return results(
        ["there is no difference .", "a house appears .", "a house appears .", "a road appears ."],
        references,
        [False, False, True, True],
        model="runs/paper",
        dataset="/home/me/data/LEVIR-MCI",
        split="test",
        meteor=False,
        mask=masks.compute(),
    )


def save_run(folder, model, processor, *overrides, recipe="paper"):
    """What `kcfi train` leaves in its folder, and rubbish of training beside it."""
    options = ["--output_dir", str(folder), "--bf16", "false", "--use_cpu", "true", "--disable_tqdm", "true"]
    save_recipe(parse_recipe(recipe, [*options, *overrides]), folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / TRAINER_STATE_NAME).write_text(json.dumps(STATE))
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-8").mkdir()
    (folder / "checkpoint-8" / "optimizer.pt").write_bytes(b"")
    return folder


@pytest.fixture
def run(tmp_path, model, processor):
    return save_run(tmp_path / "run", model, processor)


def body(card):
    """The card without its metadata."""
    return ModelCard(card).text


def test_every_score_of_a_results_file_has_a_name_in_the_card(scores):
    assert tuple(CAPTION_METRICS) == CAPTION_SCORES
    assert set(MASK_METRICS) | {"mean_iou", "accuracy"} == set(scores["mask"])


def test_metadata_reads_back_through_the_hubs_own_classes(tmp_path, run, scores):
    (run / "results.json").write_text(json.dumps(scores))
    card = card_of_run(run, "me/kcfi-levir", AutoConfig.from_pretrained(run), STATE, license="mit")
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    metadata = metadata_load(tmp_path / "README.md")
    fields = {key: value for key, value in metadata.items() if key != "model-index"}
    assert fields == {
        "language": "en",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "image-text-to-text",
        "base_model": TOWERS,
        "base_model_relation": "finetune",
        "datasets": ["lcybuaa/LEVIR-MCI"],
        "metrics": ["bleu", "rouge", "cider", "accuracy", "f1", "mean_iou"],
        "tags": ["kcfi", "remote-sensing", "change-captioning", "change-detection"],
    }
    for repository in (*metadata["base_model"], *metadata["datasets"]):
        validate_repo_id(repository)
    name, entries = model_index_to_eval_results(metadata["model-index"])
    assert name == "kcfi-levir"
    assert entries == sorted(eval_results(scores, []), key=lambda entry: entry.dataset_config)
    assert ModelCardData(**metadata).to_dict() == metadata and str(ModelCard(card)) == card


def test_model_index_holds_every_computed_score_with_its_row_and_profile(scores):
    entries = eval_results(scores, [])
    captions = [entry for entry in entries if entry.metric_config]
    assert {entry.metric_config for entry in captions} == {"coco"}
    found = {(entry.dataset_config, entry.metric_name): entry.metric_value for entry in entries}
    for row in ("all", "changed", "unchanged"):
        assert found[row, "BLEU-4 (profile coco)"] == round(scores["captions"][row]["bleu_4"], 2)
        assert (row, "METEOR (profile coco)") not in found  # no Java: not computed, and not 0
    assert found["all", "mask F1, change"] == 80.0 and found["all", "changed or unchanged"] == 75.0
    assert {(entry.dataset_type, entry.dataset_split) for entry in entries} == {("lcybuaa/LEVIR-MCI", "test")}


def test_a_card_of_masks_alone_has_no_scores_of_captions(run, scores):
    masks = {key: value for key, value in scores.items() if key not in ("captions", "change_accuracy")}
    masks |= {"pairs": {"all": 0, "changed": 0, "unchanged": 0}, "pairs_without_captions": 4}
    (run / "results.json").write_text(json.dumps(masks))
    card = card_of_run(run, "me/kcfi-levir", AutoConfig.from_pretrained(run), STATE)
    assert "4 pairs have no sentence" in card and "| change | 80.0 |" in card
    assert "BLEU" not in card and "read off the sentence" not in card
    assert {entry.metric_type for entry in eval_results(masks, [])} == {"f1", "mean_iou"}


def test_the_card_tells_rows_procedure_and_environment(run, scores):
    recipe = (run / "recipe.yaml").read_text()
    text = body(model_card("me/kcfi-levir", AutoConfig.from_pretrained(run), recipe, STATE, scores, HUB_IDS))
    for row, pairs in (("all", 4), ("changed", 2), ("unchanged", 2)):
        line = next(line for line in text.splitlines() if line.startswith(f"| {row} ({pairs}) |"))
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        expected = [scores["captions"][row][score] for score in CAPTION_METRICS]
        assert cells == ["-" if score is None else f"{score:.1f}" for score in expected]
    assert "metric profile `coco`" in text and "Scored without Java" in text
    assert "12 optimizer steps, 1.50 epochs, 48 pairs and 96 captions seen" in text
    assert "step 8, the best on split `val` by `s_m` (61.25)" in text
    assert recipe.splitlines()[0].removeprefix("# ") in text and "git revision" in text
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    assert settings == {**yaml.safe_load(recipe), "output_dir": "run"}
    assert "from `google/vit-large-patch16-224-in21k`" in text and "kept frozen, from `Qwen/Qwen2" in text


def test_adapters_of_the_language_model_are_told(tmp_path, model, processor):
    run = save_run(tmp_path / "run", model, processor, "--lora.r", "8", "--lora.lora_alpha", "16")
    text = body(card_of_run(run, "me/kcfi-lora", model.config, STATE))
    assert "kept frozen but for LoRA adapters (`r: 8, lora_alpha: 16`), from `Qwen/Qwen2" in text


def test_a_language_model_left_out_is_named_with_its_commit(run, model):
    config = copy.deepcopy(model.config)
    config.text_model, config.text_model_revision = "Qwen/Qwen2-1.5B-Instruct", "0123abc"
    text = body(card_of_run(run, "me/kcfi-levir", config, STATE))
    assert "not here: loading fetches those of `Qwen/Qwen2-1.5B-Instruct` at commit `0123abc`" in text
    assert "not here" not in body(card_of_run(run, "me/kcfi-levir", model.config, STATE))


def test_the_energy_of_all_starts_of_a_run_is_told(run, model):
    columns = "run_id,duration,emissions,energy_consumed,country_name,region,cpu_model,gpu_model"  # of CodeCarbon 3.3
    starts = ["a,3600,0.05,0.25,France,,AMD EPYC,4 x A100", "b,1800,0.025,0.15,France,,AMD EPYC,4 x A100"]
    (run / "emissions.csv").write_text("\n".join([columns, *starts]))
    card = ModelCard(card_of_run(run, "me/kcfi-levir", model.config, STATE))
    assert "0.4 kWh in 1.5 hours on 4 x A100, 75 g of CO2 equivalents with the electricity of France" in card.text
    emissions = card.data.to_dict()["co2_eq_emissions"]
    assert emissions["emissions"] == pytest.approx(75) and emissions["source"] == "codecarbon"
    (run / "emissions.csv").write_text("run_id,duration\na,1")
    with pytest.raises(ValueError, match=r"emissions.csv is no file of CodeCarbon .KeyError: 'energy"):
        card_of_run(run, "me/kcfi-levir", model.config, STATE)


def test_no_folder_of_a_machine_is_published(tmp_path, model, processor, scores):
    towers = [tmp_path / "my-vit", tmp_path / "my-lm"]
    for tower in towers:
        tower.mkdir()
    options = ["--vision_model", towers[0], "--text_model", towers[1], "--dataset", tmp_path / "my-pairs"]
    run = save_run(tmp_path / "run", model, processor, *map(str, options))
    (run / "results.json").write_text(json.dumps({**scores, "model": str(run), "dataset": str(tmp_path / "my-pairs")}))
    card = card_of_run(run, "me/kcfi-own", model.config, STATE)
    assert str(tmp_path) not in card and "from `my-vit`" in card and "`run` on my-pairs" in card
    assert "base_model" not in ModelCard(card).data.to_dict() and "datasets" not in ModelCard(card).data.to_dict()


def test_a_relative_folder_is_not_taken_for_a_model_of_the_hub(tmp_path, model, processor, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/tiny-vit").mkdir(parents=True)
    run = save_run(Path("run"), model, processor, "--vision_model", "runs/tiny-vit", "--dataset", "me/pairs")
    data = ModelCard(card_of_run(run, "me/kcfi-own", model.config, STATE)).data
    assert data.base_model == TOWERS[1:] and data.datasets == ["me/pairs"]


@pytest.mark.parametrize(
    ("dataset", "name", "hub_id"),
    [
        ("/data/Levir_CC_dataset", "LEVIR-CC", "lcybuaa/LEVIR-CC"),
        ("me/levir-mci-small", "LEVIR-MCI", "me/levir-mci-small"),
        ("synthetic", "synthetic scenes", None),
        ("/data/pairs", "pairs", None),
    ],
)
def test_a_data_set_is_known_by_its_name_and_its_own_id_on_the_hub_wins(dataset, name, hub_id):
    assert find_data_set(dataset, ["me/levir-mci-small"])[:2] == (name, hub_id)


def test_a_run_on_drawings_says_so_and_names_no_data_set_of_the_hub(tmp_path, model, processor):
    run = save_run(tmp_path / "run", model, processor, recipe="debug")
    card = ModelCard(card_of_run(run, "me/kcfi-own", model.config, STATE))
    assert "**This run trained on drawings**" in card.text and "from `kcfi-tiny`" in card.text
    assert "Not evaluated" in card.text
    assert not {"datasets", "base_model", "metrics", "model-index", "model_name"} & card.data.to_dict().keys()


def test_a_model_without_head_or_perceiver_is_described_as_one(run, model):
    config = copy.deepcopy(model.config)
    config.use_change_detection_head, config.use_key_change_perceiver = False, False
    text = body(card_of_run(run, "me/kcfi-levir", config, STATE))
    assert "(no mask: it has no head)" in text and "Change detection head: none." in text
    assert "Key change perceiver: none" in text and "Masks know" not in text


def test_a_dry_run_holds_the_model_and_nothing_of_training(tmp_path, run, model):
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    folder = tmp_path / "new" / "pushed"
    assert push(run, "me/kcfi-levir", dry_run=folder, license="mit") == str(folder)
    names = {path.name for path in folder.rglob("*")}
    assert names == {path.name for path in run.iterdir()} - {
        "recipe.yaml", "trainer_state.json", "training_args.bin", "checkpoint-8",
    } | {"README.md"}  # fmt: skip
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "modeling_kcfi.py"}
    assert list(folder.parent.iterdir()) == [folder]
    assert before == sorted(path.relative_to(run) for path in run.rglob("*"))  # the run stays as it is

    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(loaded) is KCFIForConditionalGeneration and loaded.dtype == model.dtype
    for (name, weight), (_, saved) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert weight.equal(saved), name
    assert type(AutoProcessor.from_pretrained(folder)) is KCFIProcessor


@pytest.fixture
def pushed(tmp_path, run, make_pairs, monkeypatch):
    """A folder of `kcfi push --dry-run`, and the examples of its card, for a pair of files in the current folder."""
    folder = tmp_path / "pushed"
    push(run, "me/kcfi-levir", dry_run=folder, license="mit")
    monkeypatch.chdir(tmp_path)
    pair = make_pairs()[1]
    pair["image_before"].save("before.png")
    pair["image_after"].save("after.png")
    card = (folder / "README.md").read_text(encoding="utf-8").replace("me/kcfi-levir", str(folder))
    return re.findall(r"```python\n(.*?)```", card, re.S)


def test_the_examples_of_the_card_run(pushed, capsys):
    assert len(pushed) == 3
    names = {}
    for code in pushed:
        exec(compile(code, "README.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 2  # of the first and the last
    assert names["mask"].shape == (32, 32) and names["mask_logits"].shape == (1, 2, 32, 32)
    assert np.array_equal(np.asarray(Image.open("mask.png")), names["mask"].numpy())


def test_the_last_example_of_the_card_runs_without_kcfi(pushed, tmp_path):
    code = f"import sys; sys.modules['kcfi'] = None\n{pushed[-1]}"
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() and Image.open(tmp_path / "mask.png").size == (32, 32)


def test_a_card_without_a_head_has_examples_without_a_mask(run, model):
    config = copy.deepcopy(model.config)
    config.use_change_detection_head = False
    text = body(card_of_run(run, "me/kcfi-levir", config, STATE))
    assert "change-captioning" in text and "mask_logits" not in text and 'result["mask"]' not in text


def test_the_card_tells_what_a_model_needs(run, model):
    text = body(card_of_run(run, "me/kcfi-levir", model.config, STATE))
    assert re.search(r"Needs Python >=3[\d.]+, `transformers[<>=\d.,]+`, torch, torchvision, pillow\. With", text)


def test_the_sheet_of_pairs_goes_with_the_card(tmp_path, run, scores):
    (run / "results.json").write_text(json.dumps(scores))
    push(run, "me/kcfi-levir", dry_run=tmp_path / "without", license="mit")
    assert "pairs.png" not in (tmp_path / "without" / "README.md").read_text()
    Image.new("RGB", (9, 9), "red").save(run / "pairs.png")
    push(run, "me/kcfi-levir", dry_run=tmp_path / "with", license="mit")
    assert "![pairs](pairs.png)" in (tmp_path / "with" / "README.md").read_text()
    assert (tmp_path / "with" / "pairs.png").read_bytes() == (run / "pairs.png").read_bytes()


def tower(folder, license=None):
    folder.mkdir()
    if license:
        (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    return str(folder)


@pytest.mark.parametrize(
    ("vision", "text", "expected"),
    [("mit", "mit", "mit"), ("mit", "apache-2.0", None), ("mit", None, None), ("other", "other", None)],
)
def test_a_licence_is_that_of_the_towers_or_asked_for(tmp_path, model, processor, vision, text, expected):
    towers = tower(tmp_path / "vit", vision), tower(tmp_path / "lm", text)
    run = save_run(tmp_path / "run", model, processor, "--vision_model", towers[0], "--text_model", towers[1])
    new = tmp_path / "new"
    if expected:
        push(run, "me/kcfi-own", dry_run=new)
    else:
        said = rf"Give --license.*vit: {vision}; .*lm: {text or 'not known here'}\)"
        with pytest.raises(InputError, match=said):
            push(run, "me/kcfi-own", dry_run=new)
        assert not new.exists()
        push(run, "me/kcfi-own", dry_run=new, license="openrail")
    card = ModelCard.load(new / "README.md")
    assert card.data.license == (expected or "openrail")
    assert f"`vit`: {vision}, `lm`: {text or 'not known'}." in card.text
    assert ModelCard(card_of_run(run, "me/kcfi-own", model.config, STATE)).data.license == expected


def test_a_run_that_began_with_a_model_of_this_project_needs_no_licence(tmp_path, model, processor):
    first = save_run(tmp_path / "first", model, processor, recipe="debug")  # from kcfi-tiny
    assert license_of("kcfi-tiny") == "apache-2.0" == license_of(str(first))
    run = save_run(tmp_path / "run", model, processor, "--model", str(first), recipe="debug")
    push(run, "me/kcfi-own", dry_run=tmp_path / "pushed")
    assert ModelCard.load(tmp_path / "pushed" / "README.md").data.license == "apache-2.0"


def test_the_card_of_a_tower_of_the_hub_is_read_where_it_is_at_hand(hub_text_model, tmp_path):
    name, commit = hub_text_model
    assert license_of(name) is None
    card = tmp_path / "hub" / "models--me--lm" / "snapshots" / commit / "README.md"
    card.write_text("---\nlicense: gemma\n---\n")
    assert license_of(name) == "gemma" and license_of("nobody/nothing") is None


def test_what_cannot_be_pushed_is_named(tmp_path, run):
    (run / "other.json").write_text('{"model": "x"}')
    with pytest.raises(
        ValueError, match=r"other.json is no results file of `kcfi evaluate`: it has no dataset, split"
    ):
        push(run, "me/kcfi-levir", run / "other.json", dry_run=tmp_path / "new", license="mit")
    (run / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"The weights in .* cannot be read"):
        push(run, "me/kcfi-levir", dry_run=tmp_path / "new", license="mit")
    (run / "recipe.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"recipe.yaml is not a YAML file"):
        push(run, "me/kcfi-levir", dry_run=tmp_path / "new", license="mit")
    (run / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no trainer_state.json, so it is no finished run"):
        push(run, "me/kcfi-levir", dry_run=tmp_path / "new", license="mit")
    with pytest.raises(ValueError, match="names no owner"):
        push(run, "kcfi-levir", dry_run=tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("tmp*"))


def test_the_trainer_writes_the_card_of_kcfi_push(tmp_path, run, model, processor, make_pairs):
    args = KCFITrainingArguments(
        output_dir=str(run), eval_strategy="no", save_strategy="no", use_cpu=True, hub_model_id="me/kcfi-levir"
    )
    trainer = KCFITrainer(model, args, KCFICollator(processor), train_dataset=make_pairs(), processing_class=processor)
    for name, value in STATE.items():
        setattr(trainer.state, name, value)
    trainer.create_model_card(model_name="kcfi-levir")
    assert "license" not in ModelCard.load(run / "README.md").data.to_dict()  # it is not known
    trainer.create_model_card(model_name="kcfi-levir", license="mit")
    push(run, "kcfi/kcfi-levir", dry_run=tmp_path / "pushed", license="mit")
    pushed = (tmp_path / "pushed" / "README.md").read_text()
    assert (run / "README.md").read_text() == pushed.replace("kcfi/kcfi-levir", "kcfi-levir")

    (run / "recipe.yaml").unlink()  # a run from Python, without a recipe
    trainer.create_model_card(tags=["levir"], license="mit")
    card = ModelCard.load(run / "README.md")
    assert card.data.license == "mit" and card.data.tags[-1] == "levir"
    assert "the run has no recipe" in card.text and "12 optimizer steps" in card.text


@pytest.mark.parametrize(
    "change",
    [
        {"profile": {}},
        {"captions": {"all": 5}},
        {"captions": {}},
        {"captions": "x"},
        {"mask": {"f1": {"change": "x"}}},
        {"mask": {"f1": []}},
        {"synthetic": "x"},
        {"synthetic": {"pair_mix": []}},
    ],
)
def test_a_results_file_of_which_a_card_cannot_tell_is_refused(tmp_path, scores, change):
    (tmp_path / "results.json").write_text(json.dumps({**scores, **change}))
    with pytest.raises(InputError, match=r"results\.json is no results file of `kcfi evaluate` \("):
        read_results(tmp_path / "results.json")
