"""The counts by part against the counter of the whole step, and against counts by hand."""

import sys

import flops
import pytest
import roofline
import torch

from kcfi import KCFIConfig
from kcfi.training.collator import packed_attention_mask


@pytest.fixture
def config():
    vision = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return KCFIConfig(
        vision_config={"model_type": "vit", "image_size": 32, "patch_size": 8, **vision},
        text_config={"model_type": "qwen2", "vocab_size": 99, "intermediate_size": 48, **text},
        vision_feature_layers=[1, 3],
        image_token_id=4,
    )


def test_the_parts_of_a_step_add_up_to_the_whole_step(config):
    parts = {name: roofline.count(run) for name, run in roofline.parts_of(flops.build(config), pairs=2).items()}
    operations = sum(kernel.operations for part in parts.values() for kernel in part.kernels)
    with roofline.FusedAttention():
        assert operations == pytest.approx(flops.training_flops(config, pairs=2), rel=1e-3)


def test_a_product_is_counted_with_what_it_reads_writes_and_keeps():
    weight = torch.nn.Parameter(torch.empty(30, 40, device="meta"))
    inputs = torch.empty(20, 30, device="meta", requires_grad=True)
    part = roofline.count(lambda: inputs @ weight)
    forward, first, second = [kernel for kernel in part.kernels if kernel.operations]
    assert {forward.operations, first.operations, second.operations} == {2 * 20 * 30 * 40}
    assert forward.bytes == first.bytes == second.bytes == 4 * (20 * 30 + 30 * 40 + 20 * 40)
    assert part.kept == inputs.nbytes  # not the weight, which is there anyway


def test_attention_is_one_kernel_that_keeps_no_matrix_of_scores():
    states = torch.empty(2, 3, 64, 16, device="meta", requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    part = roofline.count(lambda: attend(states, states, states))
    assert len([kernel for kernel in part.kernels if kernel.operations]) == 2
    assert part.kept < 2 * 3 * 64 * 64 * 4


def test_a_kernel_takes_the_larger_of_computing_and_moving():
    card = roofline.Card("abacus", 100.0, 10.0)
    computes, moves, only_moves = (roofline.Kernel("k", *n) for n in ((1000, 10), (100, 50), (0, 30)))
    kernels = [computes, moves, only_moves]
    assert roofline.seconds(kernels, card, fused=False) == 10 + 5 + 3
    assert roofline.seconds(kernels, card, fused=True) == 10 + 5


def test_the_blocks_of_flex_attention_are_those_that_the_mask_of_a_packed_row_touches():
    length, captions = 300, 5
    segments = torch.zeros(1, length, dtype=torch.long)
    for number in range(captions):
        start = length - (captions - number) * (1 + flops.CAPTION)
        segments[0, start : start + 1 + flops.CAPTION] = number + 1
    visible = packed_attention_mask(segments, "eager", torch.float32)[0, 0] == 0
    padded = torch.zeros(384, 384, dtype=torch.bool)
    padded[:length, :length] = visible
    touched = padded.unflatten(0, (3, 128)).unflatten(2, (3, 128)).any(dim=3).any(dim=1)
    assert roofline.packed_blocks(length, captions) == pytest.approx(float(touched.float().mean()))


def test_a_table_is_printed_for_a_config(config, tmp_path, monkeypatch, capsys):
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["roofline.py", str(tmp_path), "--pairs", "2"])
    roofline.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| part | TFLOP |") and "H100" in lines[0]
    assert any(line.startswith("| language model |") for line in lines)
    assert any(line.startswith("| **step** |") for line in lines)
    assert any("of the peak" in line and "A100" in line for line in lines)
