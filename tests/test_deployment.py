"""The ways to load a model that docs/deployment.md shows run as they stand there; its ONNX example is in test_onnx."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import kcfi
from tests.modeling_kcfi.test_generation_kcfi import ATTENTIONS, SLACK, WAYS

PAGE = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text(encoding="utf-8")
EXAMPLES = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "from_pretrained" in code]


@pytest.mark.parametrize("code", EXAMPLES, ids=["quantised", "offloaded"])
def test_a_smaller_or_moved_language_model_changes_no_mask(code, monkeypatch, tmp_path):
    if "torchao" in code:
        pytest.importorskip("torchao", reason="the extra `torchao` is not installed")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "deployment.md", "exec"), names)
    plain = AutoModelForImageTextToText.from_pretrained(kcfi.embedded_model(), dtype="float32")
    inputs = {"input_ids": torch.tensor([[*[3] * 64, 5, 6]]), "pixel_values": torch.randn(1, 2, 3, 64, 256)}
    with torch.no_grad():
        found, expected = names["model"](**inputs), plain(**inputs)
    assert torch.equal(found.mask_logits, expected.mask_logits)
    torch.testing.assert_close(found.logits, expected.logits, atol=0.5, rtol=0)


def test_the_table_of_generation_has_every_case_once():
    named = re.findall(r"`(\w+-\w+-\w+)`", PAGE)
    assert named == ["-".join(case) for case in itertools.product(ATTENTIONS, SLACK, WAYS)]
