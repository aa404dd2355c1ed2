"""The counter against operations counted by hand, from the shapes of the layers."""

import sys

import flops
import pytest

from kcfi import KCFIConfig

WIDTH, BLOCKS, PATCHES, HIDDEN = 32, 3, 16, 64  # of the vision tower: 4 x 4 patches of 8 px
DEPTH, WORDS, INNER = 2, 99, 48  # of the language model; its width is WIDTH too
STAGES, HEAD = 2, 8


@pytest.fixture
def config():
    vision = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": HIDDEN}
    text = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "num_key_value_heads": 2}
    return KCFIConfig(
        vision_config={"model_type": "vit", "image_size": 32, "patch_size": 8, **vision},
        text_config={"model_type": "qwen2", "vocab_size": WORDS, "intermediate_size": INNER, **text},
        vision_feature_layers=[1, 3],
        use_change_detection_head=False,
        use_key_change_perceiver=False,
        image_token_id=4,
    )


def by_hand(rows, tokens, scored):
    """Multiplications and additions of a forward pass: tower, projector, language model, output layer."""
    length = PATCHES + tokens
    block = 2 * (PATCHES + 1) * (4 * WIDTH**2 + 2 * WIDTH * HIDDEN) + 4 * (PATCHES + 1) ** 2 * WIDTH
    tower = 2 * (2 * PATCHES * 3 * 64 * WIDTH + BLOCKS * block)  # of both dates
    projector = 2 * PATCHES * STAGES * WIDTH * WIDTH
    layer = 2 * length * (3 * WIDTH**2 + 3 * WIDTH * INNER) + 4 * length**2 * WIDTH  # half as many keys and values
    return rows * tower, rows * projector, rows * DEPTH * layer, rows * 2 * scored * WIDTH * WORDS


def test_a_caption_costs_a_forward_pass(config):
    expected = sum(by_hand(1, flops.PROMPT + 9, 9))
    assert flops.caption_flops(config, tokens=9) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("packed", [True, False])
def test_a_step_costs_three_passes_and_two_where_the_weights_are_frozen(config, packed):
    answers = 5 * (1 + flops.CAPTION)
    tokens = flops.PROMPT + (answers if packed else flops.CAPTION)
    scored = answers + 1 if packed else PATCHES + tokens
    tower, projector, language_model, head = by_hand(2 if packed else 10, tokens, scored)
    expected = 3 * (tower + projector) + 2 * (language_model + head)
    # attention has no weights: both its operands get a gradient, so it costs three passes too
    attention = (2 if packed else 10) * DEPTH * 4 * (PATCHES + tokens) ** 2 * WIDTH
    counted = flops.training_flops(config, pairs=2, packed=packed)
    assert counted == pytest.approx(expected + attention, rel=0.03)


def test_the_pooling_of_the_command_line_replaces_that_of_the_config(config, tmp_path, monkeypatch, capsys):
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(flops, "matmul_peak", lambda dtype: 1e9)
    monkeypatch.setattr(flops, "caption_flops", lambda config: 1e9 * config.visual_token_pooling)
    for pooling in (1, 2):
        monkeypatch.setattr(sys, "argv", ["flops.py", str(tmp_path), "--visual_token_pooling", str(pooling)])
        flops.main()
        assert f"caption of a pair: {pooling}.00 GFLOP" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["flops.py", str(tmp_path), "--visual_token_pooling", "3"])
    with pytest.raises(ValueError, match="visual_token_pooling=3 does not divide"):
        flops.main()
