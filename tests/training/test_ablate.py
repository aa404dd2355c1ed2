"""`kcfi ablate` for real, with a tiny model: trained in processes of their own, scored, resumed, failed."""

import json
import shutil

import pytest
import yaml

from kcfi.training import train
from kcfi.training.ablate import _is_scored, ablate, last_error
from kcfi.training.ablation_table import read_set
from kcfi.training.synthetic.dataset import synthesize

OVERRIDES = ["--learning_rate", "2e-4"]


@pytest.fixture
def plan(tmp_path, text_model, vision, monkeypatch):
    """A set of two rows: `small`, and `broken`, whose model cannot be built."""
    monkeypatch.setenv("PATH", "")  # without Java, which takes seconds to start
    synthesize(tmp_path / "pairs", 10, 0)
    small = {
        "vision_config": vision,
        "text_model": str(text_model),
        "model_settings": {"flow_residual": "cross"},
        "train_vision_tower": False,
        "feature_cache": str(tmp_path / "features"),
        "dataset": str(tmp_path / "pairs"),
        "num_train_pairs": 4,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "eval_strategy": "no",
        "use_cpu": True,
    }
    broken = {"base": "small.yaml", "model_settings": {"vision_feature_layers": [1, 9]}}
    recipes = {"small": small, "broken": broken}
    rows = [{"group": "Table X", "label": name, "recipe": f"{name}.yaml"} for name in recipes]
    values = {"title": "Trial", "dataset": "LEVIR-CC", "seeds": [0], "rows": rows}
    for name, content in {**recipes, "set": values}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return read_set(tmp_path / "set.yaml")


def interrupt(recipe, folder):
    """Leave of a run what a killed one leaves after its first epoch."""
    train.main([str(recipe), *OVERRIDES, "--seed", "0", "--output_dir", str(folder)])
    shutil.rmtree(folder / "checkpoint-4")
    for name in ("model.safetensors", "trainer_state.json"):
        (folder / name).unlink()


def test_an_interrupted_run_goes_on_a_finished_one_is_kept_and_a_failed_one_is_a_failed_row(plan, tmp_path, capsys):
    out, small = tmp_path / "out", tmp_path / "out" / "small-0"
    interrupt(tmp_path / "small.yaml", small)
    capsys.readouterr()
    errors = ablate(plan, plan.runs(), out, OVERRIDES, meteor=False)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("1/2 small-0: CIDEr-D ")
    assert errors.keys() == {"broken-0"} and second == f"2/2 broken-0: failed: {errors['broken-0']}"
    assert errors["broken-0"].startswith("exit code 2: kcfi: error: vision_feature_layers=[1, 9]")

    assert json.loads((small / "trainer_state.json").read_text())["global_step"] == 4
    report = json.loads((small / "results.json").read_text())
    assert (report["split"], report["pairs"]["all"]) == ("test", 1)
    assert len(list(tmp_path.glob("features/*/*.safetensors"))) == 2 * (4 + 1)  # of the pairs trained on and scored
    text = (out / "table.md").read_text()
    assert text.startswith("# Trial: pairs (test, 1 pairs), seeds 0\n")
    assert f"| Table X | broken (0 of 1 seeds)<br>seed 0 failed: {errors['broken-0']} | - |" in text

    runs = plan.runs(rows=["small"])
    times = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    assert ablate(plan, runs, out, OVERRIDES, meteor=False) == {}
    assert "| broken (0 of 1 seeds) |" in (out / "table.md").read_text()  # the whole set, though one row was run
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == times
    with pytest.raises(ValueError, match=r"started with other settings .*learning_rate: 0.0002 -> 0.0001"):
        ablate(plan, runs, out, meteor=False)


@pytest.mark.slow
def test_a_run_on_masks_alone_is_scored_without_meteor(tmp_path):
    report = {"mask": {"f1": {"change": 50.0}, "mean_iou": 40.0}}
    for captions, scored in (({}, True), ({"captions": {"all": {"bleu_4": 1.0, "meteor": None}}}, False)):
        captions = captions and {"captions": {**captions["captions"], "changed": {"cider_d": 1.0}}}
        (tmp_path / "results.json").write_text(json.dumps({**report, "change_accuracy": 50.0, **captions}))
        assert _is_scored(tmp_path, meteor=True) == scored


def test_a_run_may_have_several_processes(plan, tmp_path):
    plan.rows = plan.rows[:1]
    assert ablate(plan, plan.runs(), tmp_path / "out", ["--num_train_epochs", "1"], meteor=False, processes=2) == {}
    state = json.loads((tmp_path / "out" / "small-0" / "trainer_state.json").read_text())
    assert state["global_step"] == 1  # 4 pairs: 2 on each rank
    values = yaml.safe_load((tmp_path / "out" / "small-0" / "recipe.yaml").read_text())
    assert (values["seed"], values["num_train_epochs"]) == (0, 1)


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("step 1\nTraceback (most recent call last):\n  File x\nKeyError: 'a'\n\n  2%|#\r", "KeyError: 'a'"),
        ("OSError: [Errno 28] No space\nkcfi: error: disk is full\n", "kcfi: error: disk is full"),
        (
            "[rank1]: torch.OutOfMemoryError: CUDA\ntorch.distributed.elastic.errors.ChildFailedError:\n=====\n",
            "torch.OutOfMemoryError: CUDA",
        ),
        (" 45%|####5 \r 46%|####6 ", "46%|####6"),  # killed
        ("", "no output"),
    ],
)
def test_the_error_of_a_run_is_the_end_of_its_last_traceback(log, line):
    assert last_error(log) == line
