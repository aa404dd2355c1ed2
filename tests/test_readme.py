"""What README.md and docs/ show runs as it stands there: Python examples, recipes, options of commands."""

import json
import re
import shlex
from pathlib import Path

import datasets
import pytest

from kcfi.training.arguments import find_recipe, known_fields
from kcfi.training.data.shards import write_shards
from kcfi_cli import main

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
PYTHON = [(name, code) for name, page in PAGES.items() for code in re.findall(r"```python\n(.*?)```", page, re.S)]
SHOWN = ("README.md", "docs/captioning.md", "docs/loading.md")
EXAMPLES = [(name, code) for name, code in PYTHON if name in SHOWN and "join_towers" not in code]  # it downloads
[TRAINING] = [code for name, code in PYTHON if name == "docs/training.md"]
COMMANDS = [
    (name, " ".join(command.split()))
    for name, page in PAGES.items()
    for command in re.findall(r"^\$ (?:kcfi|torchrun .* -m kcfi_cli) ([a-z].*)$|`kcfi ([a-z][^`]*)`", page, re.M)
    for command in command
    if command
]


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_python_example_prints_a_sentence(name, code, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(code, name, "exec"), {})
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
    exec(compile(TRAINING, "training.md", "exec"), {})
    assert 0 < float(capsys.readouterr().out.splitlines()[-1]) <= 100
    assert (tmp_path / "runs/mine/checkpoint-1/model.safetensors").is_file()


def test_the_pages_have_examples_and_name_recipes_that_exist():
    named = ["README.md", "docs/captioning.md", "docs/captioning.md", "docs/loading.md"]
    assert [name for name, _ in EXAMPLES] == named
    recipes = {recipe for page in PAGES.values() for recipe in re.findall(r"kcfi train (\w+)(?= |$|`)", page, re.M)}
    assert {"paper", "released", "debug", "change_context", "real_towers"} <= recipes
    for recipe in recipes - {"RECIPE", "my_town"}:
        assert find_recipe(recipe).is_file()


def test_the_first_command_of_the_readme_prints_what_it_shows(monkeypatch, tmp_path, capsys):
    command, shown = re.search(r"^\$ kcfi (caption .*)\n((?:.+\n)+)```", PAGES["README.md"], re.M).groups()
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command.replace("--output report", f"--output {tmp_path}"))) == 0
    printed = capsys.readouterr().out.replace(str(tmp_path), "report")
    digits = re.compile(r"\d+")  # a pixel more or less is another machine
    assert digits.sub("#", printed) == digits.sub("#", shown)


@pytest.mark.slow
def test_the_page_of_scenes_runs_as_it_stands_there(monkeypatch, tmp_path, capsys):
    pytest.importorskip("rioxarray")
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    draw, *examples = [code for name, code in PYTHON if name == "docs/scenes.md"]
    exec(compile(draw, "scenes.md", "exec"), {})
    digits = re.compile(r"\d+")  # a pixel more or less is another machine
    shown = re.findall(r"^\$ kcfi (scene 2019.*)\n((?:.+\n)+)```", PAGES["docs/scenes.md"], re.M)
    assert len(shown) == 2
    for command, lines in shown:
        assert main(shlex.split(command)) == 0
        printed = digits.sub("#", capsys.readouterr().out).splitlines()
        assert [line for line in lines.splitlines() if line != "  ..." and digits.sub("#", line) not in printed] == []
    for code in examples:
        exec(compile(code, "scenes.md", "exec"), {})
    assert len(examples) == 3 and "1" in capsys.readouterr().out and Path("first_seen.png").is_file()


def help_of(command: str, capsys) -> str:
    """What `kcfi caption --help`, or `kcfi data check --help`, prints."""
    words = command.split()
    with pytest.raises(SystemExit) as ended:
        main([*words[: 2 if words[0] == "data" else 1], "--help"])
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", sorted({command.split()[0] for _, command in COMMANDS}))
def test_every_command_is_one_and_has_the_options_it_is_shown_with(kind, capsys):
    known: dict[str, set[str]] = {}
    for name, command in COMMANDS:
        if command.split()[0] != kind:
            continue
        path = " ".join(command.split()[: 2 if kind == "data" else 1])
        if path not in known:
            known[path] = set(re.findall(r"--[\w-]+", help_of(command, capsys)))
        if kind in ("train", "ablate"):  # the help leaves out the fields of transformers.TrainingArguments
            known[path] |= {f"--{field}" for field in known_fields()}
        options = {word.partition(".")[0] for word in shlex.split(command, comments=True) if word.startswith("--")}
        assert options <= known[path], f"{name}: kcfi {command}"
