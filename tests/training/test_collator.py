import functools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel, AutoTokenizer

from kcfi.modeling_kcfi import KCFIConfig, KCFIForConditionalGeneration
from kcfi.processing import INSTRUCTIONS, KCFIProcessor
from kcfi.training.collator import PADDING, KCFICollator, check_packing, packed_attention_mask

WORDS = "the a house scene tree left right . appears same before no change is built in two".split()


def prompts_of(processor):
    return [processor.encode_prompt(instruction) for instruction in INSTRUCTIONS]


def batch_of(collator, pairs, indices=None):
    return collator([pairs[index] for index in indices or range(len(pairs))])


def texts(processor, batch):
    """What is learned in each row, as text."""
    return [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def test_only_the_caption_and_its_end_are_learned(processor, make_pairs):
    pairs = make_pairs(2)
    batch = batch_of(KCFICollator(processor, captions_per_pair=1), pairs)
    for row, pair in enumerate(pairs[index] for index in range(2)):
        learned = batch["labels"][row] != -100
        assert torch.equal(batch["input_ids"][row][learned], batch["labels"][row][learned])
        assert texts(processor, batch)[row] in [f"{caption} <eos>" for caption in pair["captions"]]
        last = (batch["segment_ids"][row] != PADDING).sum() - 1
        assert learned[last] and not learned[last + 1 :].any()  # padding stands at the right, unlearned
        assert learned.sum() == learned[last - learned.sum() + 1 : last + 1].sum()  # one stretch, behind the prompt


def test_training_rows_begin_with_the_prompt_that_evaluation_uses(processor, make_pairs):
    collator = KCFICollator(processor, captions_per_pair=1)
    prompts = {tuple(processor.encode_prompt(instruction)) for instruction in INSTRUCTIONS}
    batch = batch_of(collator, make_pairs(8))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert tuple(ids[: (labels != -100).nonzero()[0, 0]].tolist()) in prompts
    assert torch.equal(batch["position_ids"][0], torch.arange(len(batch["position_ids"][0])))
    evaluated = batch_of(collator.for_evaluation(), make_pairs(8))
    assert evaluated["input_ids"].tolist() == [processor.encode_prompt(INSTRUCTIONS[0])] * 8


def test_draws_depend_on_seed_epoch_and_filename_alone(processor, make_pairs):
    pairs = make_pairs(8)
    collator = KCFICollator(processor, seed=1)
    first = batch_of(collator, pairs)
    alone = batch_of(KCFICollator(processor, seed=1), pairs, [5])
    torch.manual_seed(123)
    assert torch.equal(batch_of(collator, pairs)["input_ids"], first["input_ids"])
    width = alone["input_ids"].shape[1]
    assert torch.equal(alone["input_ids"][0], first["input_ids"][5][:width])

    collator.set_epoch(1)
    assert texts(processor, batch_of(collator, pairs)) != texts(processor, first)
    collator.set_epoch(0)
    assert texts(processor, batch_of(collator, pairs)) == texts(processor, first)
    assert texts(processor, batch_of(KCFICollator(processor, seed=2), pairs)) != texts(processor, first)


def test_all_instructions_are_drawn_in_training(processor, make_pairs):
    batch = batch_of(KCFICollator(processor), make_pairs(64))
    prompts = {
        tuple(ids[labels == -100][:200].tolist())
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    }
    starts = {tuple(processor.encode_prompt(instruction)) for instruction in INSTRUCTIONS}
    assert all(any(prompt[: len(start)] == start for prompt in prompts) for start in starts)


def test_workers_that_outlive_an_epoch_draw_like_the_main_process(processor, make_pairs):
    pairs = make_pairs(8)
    collator = KCFICollator(processor)
    loader = DataLoader(pairs, batch_size=4, collate_fn=collator, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        collator.set_epoch(epoch)
        rows = [text for batch in loader for text in texts(processor, batch)]
        assert rows == texts(processor, batch_of(collator, pairs))


def test_captions_of_a_pair_stand_in_segments_behind_one_prompt(processor, make_pairs):
    batch = batch_of(KCFICollator(processor, captions_per_pair=3), make_pairs(2))
    assert len(batch["input_ids"]) == len(batch["pixel_values"]) == len(batch["mask_labels"]) == 2
    for pair in range(2):
        ids, segments, labels = (batch[name][pair] for name in ("input_ids", "segment_ids", "labels"))
        [prompt] = {tuple(prompt) for prompt in prompts_of(processor) if prompt[:-1] == ids[segments == 0].tolist()}
        captions = [processor.tokenizer.decode(ids[segments == number][1:]) for number in (1, 2, 3)]
        assert sorted(captions) == sorted(f"{caption} <eos>" for caption in make_pairs(2)[pair]["captions"])
        for number in (1, 2, 3):
            positions = batch["position_ids"][pair][segments == number]
            assert positions.tolist() == list(range(len(prompt) - 1, len(prompt) - 1 + len(positions)))
            assert ids[segments == number][0] == prompt[-1]
            assert labels[segments == number].tolist() == [-100, *ids[segments == number][1:].tolist()]
        assert (labels[segments <= 0] == -100).all()


SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
EXACT = {  # computes in fp64 throughout; transformers' RMS norms and our warping are fp32 in any model
    "text_config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2},
    "use_key_change_perceiver": False,
}
USUAL = {"text_config": {"model_type": "qwen2", "num_key_value_heads": 1, **SIZE}}


@functools.cache
def packing_model(text_model, visual_inputs, dtype):
    """A tiny model with visible differences, and its processor."""
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    processor = KCFIProcessor.from_towers(tokenizer, image_size=32, patch_size=8, visual_inputs=visual_inputs)
    settings = EXACT if dtype == torch.float64 else USUAL
    text = {**settings["text_config"], "vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": 1}
    tower = {"model_type": "vit", "image_size": 32, "patch_size": 8, **SIZE}
    token = processor.image_token_id
    torch.manual_seed(0)
    model = KCFIForConditionalGeneration(
        KCFIConfig(
            vision_config=tower,
            image_token_id=token,
            visual_inputs=visual_inputs,
            **{**settings, "text_config": text},
        )
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval(), processor


def loss_and_gradients(model, batch):
    """Caption loss of a training batch in the model's precision (the model's own is fp32), gradients by parameter."""
    model.zero_grad()
    batch = {name: value for name, value in batch.items() if name not in ("filenames", "mask_labels")}
    implementation = model.model.language_model.config._attn_implementation
    mask = packed_attention_mask(batch.pop("segment_ids"), implementation, model.dtype)
    outputs = model(**batch, attention_mask=mask, use_cache=False)
    loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(outputs.caption_loss, loss.float())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def pad_left(batch):
    """Move the padding of every row in front of it."""
    shifts = (batch["segment_ids"] < 0).sum(dim=1).tolist()
    for name in ("input_ids", "segment_ids", "position_ids", "labels"):
        rows = [row.roll(shift) for row, shift in zip(batch[name], shifts, strict=True)]
        batch[name] = torch.stack(rows)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("visual_inputs", ["change", "bitemporal", "bitemporal_change"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=3),
    implementation=st.sampled_from(["eager", "sdpa"]),
    padding_side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
)
def test_packed_captions_have_the_loss_and_gradients_of_one_row_each(
    text_model, make_pairs, dtype, tolerance, visual_inputs, lengths, implementation, padding_side, seed
):
    model, processor = packing_model(text_model, visual_inputs, dtype)
    model.set_attn_implementation({"text_config": implementation})
    draw = random.Random(seed)
    pairs = [
        {**make_pairs(9)[index], "captions": [" ".join(draw.choices(WORDS, k=length)) for length in captions]}
        for index, captions in enumerate(lengths)
    ]
    collator = KCFICollator(processor, captions_per_pair=5, seed=seed)
    packed = collator(pairs)
    plain = collator([{**pair, "captions": [caption]} for pair in pairs for caption in pair["captions"]])
    assert len(plain["labels"]) == sum(map(len, lengths)) and len(packed["labels"]) == len(pairs)
    for batch in (packed, plain):
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        if padding_side == "left":
            pad_left(batch)

    (loss, gradients), (expected, twins) = (loss_and_gradients(model, batch) for batch in (packed, plain))
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == twins.keys()
    scale = max(gradient.abs().max() for gradient in twins.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, twins[name], rtol=tolerance, atol=tolerance * float(scale), msg=name)


TINY = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}, 10),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 400}, 401),
        ({"model_type": "bloom", "n_layer": 2, "n_head": 2}, 10),
    ],
)
def test_a_language_model_that_mixes_captions_up_is_refused(settings, longest):
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(**TINY, num_hidden_layers=2, **settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(ValueError, match=rf"\({settings['model_type']}\) cannot keep .* set captions_per_pair to 1"):
        check_packing(model, longest)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral", "gpt2", "opt"])
def test_a_language_model_that_keeps_captions_apart_is_accepted(model_type):
    torch.manual_seed(0)
    names = {"gpt2": {"n_embd": 16, "n_head": 2}, "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32}}
    settings = names.get(model_type, {"num_key_value_heads": 2})
    config = AutoConfig.for_model(model_type, **TINY, num_hidden_layers=2, **settings)
    check_packing(AutoModel.from_config(config).eval(), 400)


def test_flex_attention_gets_the_same_mask_as_a_block_mask():
    segments = torch.tensor([[0, 0, 1, 1, 2, 2, -1], [0, 0, 0, 1, 1, 1, 1]])
    dense = packed_attention_mask(segments, "sdpa", torch.float32)[:, 0] == 0
    block = packed_attention_mask(segments, "flex_attention", torch.float32)
    rows, places = torch.arange(2)[:, None, None], torch.arange(7)
    assert torch.equal(block.mask_mod(rows, 0, places[:, None], places), dense)
    assert dense[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]


def test_flash_attention_takes_one_caption_per_row_only():
    with pytest.raises(ValueError, match='attn_implementation="sdpa", or set captions_per_pair to 1'):
        packed_attention_mask(torch.tensor([[0, 1, 2]]), "flash_attention_2", torch.float32)
    mask = packed_attention_mask(torch.tensor([[0, 1, 1], [0, 1, -1]]), "flash_attention_2", torch.float32)
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_pair_without_a_mask_has_no_labels_and_a_batch_without_masks_has_none(processor, make_pairs):
    collator = KCFICollator(processor)
    mixed = batch_of(collator, make_pairs(4, masks="some"))["mask_labels"]
    assert (mixed[0] == 255).all() and (mixed[3] == 255).all()
    assert set(mixed[1].unique().tolist()) == {0, 1}
    assert "mask_labels" not in batch_of(collator, make_pairs(4, masks="none"))


def test_buildings_are_the_class_that_the_setting_says(processor, make_pairs):
    mask = batch_of(KCFICollator(processor, "road_building"), make_pairs(2))["mask_labels"][1]
    assert set(mask.unique().tolist()) == {0, 2}


def test_evaluation_batches_carry_what_predictions_are_compared_with(processor, make_pairs):
    pairs = make_pairs(4, masks="some")
    batch = batch_of(KCFICollator(processor).for_evaluation(), pairs)
    assert batch["filenames"] == [f"pair_{index}.png" for index in range(4)]
    assert batch["references"] == [pairs[index]["captions"] for index in range(4)]
    assert batch["changed"] == [False, True, False, True]
    assert batch["sizes"] == [(32, 32)] * 4
    assert batch["true_masks"][0] is None
    assert np.array_equal(batch["true_masks"][1], np.asarray(pairs[1]["mask"]) // 255)
    assert texts(processor, batch)[1] == f"{pairs[1]['captions'][0]} <eos>"


def test_a_pair_without_captions_is_its_prompt_and_changes_no_other_row(processor, make_pairs):
    pairs, collator = make_pairs(3), KCFICollator(processor, seed=3)
    with_captions = collator([pairs[index] for index in range(3)])
    batch = collator([pairs[0], {**pairs[1], "captions": []}, pairs[2]])
    assert (batch["labels"][1] == -100).all() and set(batch["segment_ids"][1].tolist()) == {0, -1}
    assert processor.image_token_id in batch["input_ids"][1]
    for name in ("input_ids", "segment_ids", "position_ids", "labels"):
        length = batch[name].shape[1]  # the pair had the longest row
        assert torch.equal(batch[name][[0, 2]], with_captions[name][[0, 2], :length]), name
    alone = collator([{**pairs[1], "captions": []}])
    assert torch.equal(alone["input_ids"][0], batch["input_ids"][1][: alone["input_ids"].shape[1]])


def test_pairs_without_captions_have_an_empty_label_in_evaluation(processor, make_pairs):
    pair = {**make_pairs(1)[0], "captions": []}
    batch = KCFICollator(processor).for_evaluation()([pair])
    assert batch["labels"].shape == (1, 0) and batch["labels"].dtype == torch.int64
    assert batch["references"] == [[]]


def test_a_pair_with_neither_captions_nor_a_mask_is_named(processor, make_pairs):
    with pytest.raises(ValueError, match=r"pair_0\.png: neither captions nor a mask"):
        KCFICollator(processor)([{**make_pairs(1, masks="none")[0], "captions": []}])


def test_more_captions_than_a_pair_can_have_are_refused(processor):
    with pytest.raises(ValueError, match="captions_per_pair=6"):
        KCFICollator(processor, captions_per_pair=6)


def test_a_batch_for_captions_that_the_model_draws_has_prompts_and_all_references(processor, make_pairs):
    pairs = make_pairs(4)
    drawn = KCFICollator(processor, seed=3, sampled=True)([pairs[index] for index in range(4)])
    plain = KCFICollator(processor, seed=3)([pairs[index] for index in range(4)])
    assert "labels" not in drawn and torch.equal(drawn["pixel_values"], plain["pixel_values"])
    assert drawn["references"] == [pairs[index]["captions"] for index in range(4)]
    for prompt, row in zip(drawn["prompts"], plain["input_ids"].tolist(), strict=True):
        assert row[: len(prompt)] == prompt
