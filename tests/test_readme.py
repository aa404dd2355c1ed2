"""The Python examples of the README run as they stand there, and its packaged recipes exist."""

import re
from pathlib import Path

import pytest

from kcfi.training.arguments import find_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "embedded_model" in code]


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_example_prints_a_sentence(code, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    assert "houses" in capsys.readouterr().out


def test_the_readme_has_examples_and_names_recipes_that_exist():
    assert len(EXAMPLES) == 2
    for recipe in re.findall(r"kcfi train (\w+)(?= |$)", README):
        assert find_recipe(recipe).is_file()
