"""The Python examples of the README run as they stand there, and its packaged recipes exist."""

import json
import re
from pathlib import Path

import datasets
import pytest

from kcfi.training.arguments import find_recipe
from kcfi.training.data.shards import write_shards
from kcfi_cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "embedded_model" in code]
[TRAINING] = [code for code in EXAMPLES if "KCFITrainer" in code]
EXAMPLES.remove(TRAINING)


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_example_prints_a_sentence(code, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    assert "houses" in capsys.readouterr().out


def test_the_training_example_trains_on_shards(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")  # without Java, which takes seconds to start
    main(["data", "synthesize", "--pairs", "20", "--output", str(tmp_path / "pairs")])
    captions = tmp_path / "pairs/LevirCCcaptions.json"
    content = json.loads(captions.read_text())
    captions.write_text(json.dumps({**content, "images": content["images"][12:]}))  # four to train on, two to evaluate
    write_shards(tmp_path / "pairs", tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    exec(compile(TRAINING, "README.md", "exec"), {})
    assert 0 < float(capsys.readouterr().out.splitlines()[-1]) <= 100
    assert (tmp_path / "runs/mine/checkpoint-1/model.safetensors").is_file()


def test_the_readme_has_examples_and_names_recipes_that_exist():
    assert len(EXAMPLES) == 2
    for recipe in re.findall(r"kcfi train (\w+)(?= |$)", README):
        assert find_recipe(recipe).is_file()
