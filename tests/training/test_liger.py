"""Liger's real kernel, which Triton interprets on a CPU where TRITON_INTERPRET=1 stands before its first import."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kcfi.modeling_kcfi.modeling_kcfi import chunked_caption_loss
from kcfi.models import load
from kcfi.training import liger
from kcfi.training.train import main as train

pytest.importorskip("liger_kernel", reason="the extra `liger` is not installed")

COMPARISON = """
import itertools
import sys
import torch
from kcfi.modeling_kcfi import modeling_kcfi
from kcfi.modeling_kcfi.modeling_kcfi import chunked_caption_loss
from kcfi.training import liger
from kcfi.training.liger import fused_caption_loss

modeling_kcfi.CHUNK = liger.CHUNK = int(sys.argv[1])
torch.manual_seed(0)
weights = torch.nn.Linear(16, 101, bias=False).weight.detach()
labels = torch.randint(0, 101, (3, 9))
labels[0, 4:] = -100
means = []
for dtype, autocast, trained, items in itertools.product(
    (torch.float32, torch.bfloat16), (False, True), (True, False), (19, torch.tensor(7))
):
    found = []
    for loss_of in (chunked_caption_loss, fused_caption_loss):
        lm_head = torch.nn.Linear(16, 101, bias=False, dtype=dtype).requires_grad_(trained)
        lm_head.weight.data.copy_(weights)
        torch.manual_seed(1)
        states = torch.randn(3, 9, 16, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(lm_head, states, labels, items)
        learned = [states, lm_head.weight] if trained else [states]
        found.append([loss.detach().float(), *(gradient.float() for gradient in torch.autograd.grad(loss, learned))])
    tolerance = 1e-5 if dtype == torch.float32 and not autocast else 2e-2
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(plain, fused, rtol=tolerance, atol=tolerance * float(plain.abs().max()))
    means.append(float(found[0][0]))
print(means[0], means[1])
"""

TRAINING = """
import sys
from kcfi.training import trainer
from kcfi.training.liger import fused_caption_loss
from kcfi.training.train import main

trainer.caption_loss_of = lambda model, args: fused_caption_loss  # as on a GPU
main(sys.argv[1:])
"""


def interpreted(code, *options):
    """Standard output of Python in a process that interprets Triton."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *options]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("chunk", [4, 1024])  # of 24 positions
def test_the_kernel_has_the_loss_and_the_gradients_of_ours(chunk):
    mean, scaled = map(float, interpreted(COMPARISON, str(chunk)).split())
    assert mean > 4 and scaled > mean  # about log 101; 19 tokens, divided by 7


def test_a_training_with_the_kernel_has_the_losses_of_one_without(tmp_path):
    options = ["debug", "--max_steps", "3", "--warmup_steps", "0", "--logging_steps", "1"]
    options += ["--eval_strategy", "no", "--save_strategy", "no"]
    train([*options, "--output_dir", str(tmp_path / "ours")])
    interpreted(TRAINING, *options, "--output_dir", str(tmp_path / "liger"))
    logs = {}
    for name in ("ours", "liger"):
        state = json.loads((tmp_path / name / "trainer_state.json").read_text(encoding="utf-8"))
        logs[name] = [line["caption_loss"] for line in state["log_history"] if "caption_loss" in line]
    assert len(set(logs["ours"])) == 3 and logs["liger"] == pytest.approx(logs["ours"], rel=1e-4)


def test_the_setting_reaches_the_trainer_which_refuses_a_cpu(tmp_path):
    with pytest.raises(ValueError, match=r"use_liger_kernel: its kernel .* needs a GPU"):
        train(["debug", "--use_liger_kernel", "true", "--output_dir", str(tmp_path)])


def test_the_model_takes_its_training_loss_from_the_function_it_is_given(detector):
    model, processor = load(str(detector))
    inputs = {"input_ids": torch.tensor([processor.encode_prompt()])}
    inputs["pixel_values"] = torch.zeros(1, 2, 3, model.config.image_size, model.config.image_size)
    model.caption_loss_function = lambda lm_head, states, labels, items: states.sum() * 0 + 42
    assert model(**inputs, labels=inputs["input_ids"], skip_logits=True).caption_loss == 42
    assert model.eval()(**inputs, labels=inputs["input_ids"]).caption_loss != 42


def test_what_the_kernel_cannot_do_is_refused(detector, monkeypatch):
    model, args = load(str(detector))[0], SimpleNamespace(use_liger_kernel=False, device=torch.device("cuda"))
    assert liger.caption_loss_of(model, args) is chunked_caption_loss
    args.use_liger_kernel = True
    assert liger.caption_loss_of(model, args) is liger.fused_caption_loss
    with monkeypatch.context() as patch:
        patch.setattr(liger, "is_liger_kernel_available", lambda: False)
        with pytest.raises(ValueError, match=r"pip install 'kcfi\[liger\]'"):
            liger.caption_loss_of(model, args)
    with monkeypatch.context() as patch:
        patch.setattr(liger, "is_deepspeed_zero3_enabled", lambda: True)
        with pytest.raises(ValueError, match="take ZeRO-2"):
            liger.caption_loss_of(model, args)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="`lm_head` is a Sequential"):
        liger.caption_loss_of(model, args)
    args.device = torch.device("cpu")
    with pytest.raises(ValueError, match="needs a GPU"):
        liger.caption_loss_of(model, args)
