import json
import sys
from functools import partial

import measure
import pytest
import torch
import train_step

from kcfi.models import load


@pytest.fixture
def tiny(detector, monkeypatch):
    """A tiny model in place of a large one, on one pair."""
    model, processor = load(str(detector))
    model.train().model.language_model.requires_grad_(False)
    for weight in model.model.language_model.parameters():
        weight.data *= 0.1  # as large as usual
    monkeypatch.setattr(train_step, "build", lambda case, pooling: (model, processor))
    monkeypatch.setattr(train_step, "matmul_peak", lambda dtype: 1e12)
    options = ["--cases", "kcfi-dinov2s-smollm2-135m"]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *options, "--pairs", "1", "--repeats", "1", "--json"])
    return model


def test_both_sides_have_the_same_gradients_and_ours_does_less_work(tiny, capsys):
    train_step.main()
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["case"] == "kcfi-dinov2s-smollm2-135m, bf16, 1 pairs x 5 captions"
    plain, ours = row["gflop"]
    assert plain > 1.5 * ours > 0 and all(0 < share < 1 for share in row["of_peak"])
    assert len(row["peak_mib"]) == 2 * measure.PEAK.exists() and row["equal"].startswith("gradients to ")


def test_a_side_with_other_gradients_is_refused(tiny, monkeypatch):
    packed_loss = train_step.packed_loss
    monkeypatch.setattr(train_step, "packed_loss", lambda *inputs: 1.001 * packed_loss(*inputs))
    with pytest.raises(AssertionError, match=r"the gradients differ by 1\.0e-03"):
        train_step.main()


def test_a_round_changes_no_weight(tiny):
    before = {name: weight.clone() for name, weight in tiny.named_parameters()}
    sides = train_step.make_sides(1, *train_step.build("kcfi-tiny", pooling=None))
    found = {name: train_step.gradients(side, tiny) for name, side in sides.items()}
    assert all((weight == before[name]).all() for name, weight in tiny.named_parameters())
    assert found["ours"] and not any(name.startswith("model.language_model") for name in found["ours"])


def test_pooling_replaces_that_of_the_config_in_model_and_prompt():
    tokens = {}
    for pooling in (1, 2):
        model, processor = train_step.build("kcfi-tiny", pooling=pooling)
        assert model.config.visual_token_pooling == pooling
        tokens[pooling] = processor._get_num_multimodal_tokens([(256, 256)] * 2).num_image_tokens
    assert tokens[1] == [4 * count for count in tokens[2]]


@pytest.mark.slow
def test_compiled_the_packed_step_is_compared_with_itself(tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced, which takes seconds
    torch.compiler.reset()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--compiled"])
    train_step.main()
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["case"].endswith("1 pairs x 5 captions, packed, as it is and compiled") and row["bar"] == 1.6
    assert row["equal"].startswith("gradients to ") and row["gflop"] == []
