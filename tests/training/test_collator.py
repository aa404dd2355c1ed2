import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kcfi.processing import INSTRUCTIONS
from kcfi.training.collator import KCFICollator


def batch_of(collator, pairs, indices=None):
    return collator([pairs[index] for index in indices or range(len(pairs))])


def texts(processor, batch):
    """What is learned in each row, as text."""
    return [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def test_only_the_caption_and_its_end_are_learned(processor, make_pairs):
    pairs = make_pairs(2)
    batch = batch_of(KCFICollator(processor), pairs)
    for row, pair in enumerate(pairs[index] for index in range(2)):
        learned = batch["labels"][row] != -100
        assert torch.equal(batch["input_ids"][row][learned], batch["labels"][row][learned])
        assert texts(processor, batch)[row] in [f"{caption} <eos>" for caption in pair["captions"]]
        last = batch["attention_mask"][row].sum() - 1
        assert learned[last] and not learned[last + 1 :].any()  # padding stands at the right, unlearned
        assert learned.sum() == learned[last - learned.sum() + 1 : last + 1].sum()  # one stretch, behind the prompt


def test_training_rows_begin_with_the_prompt_that_evaluation_uses(processor, make_pairs):
    collator = KCFICollator(processor)
    prompts = {tuple(processor.encode_prompt(instruction)) for instruction in INSTRUCTIONS}
    batch = batch_of(collator, make_pairs(8))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert tuple(ids[: (labels != -100).nonzero()[0, 0]].tolist()) in prompts
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


def test_captions_of_a_pair_share_its_instruction_and_its_pixels(processor, make_pairs):
    batch = batch_of(KCFICollator(processor, captions_per_pair=3), make_pairs(2))
    assert batch["input_ids"].shape[0] == batch["pixel_values"].shape[0] == batch["mask_labels"].shape[0] == 6
    assert len(batch["filenames"]) == 2
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][2])
    assert not torch.equal(batch["pixel_values"][2], batch["pixel_values"][3])
    assert len(set(texts(processor, batch)[:3])) == 3
    prompts = [ids[labels == -100].tolist() for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    assert prompts[0][:50] == prompts[1][:50] == prompts[2][:50]


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


def test_a_pair_without_captions_is_named(processor, make_pairs):
    with pytest.raises(ValueError, match=r"pair_0\.png: no captions"):
        KCFICollator(processor)([{**make_pairs(1)[0], "captions": []}])


def test_more_captions_than_a_pair_can_have_are_refused(processor):
    with pytest.raises(ValueError, match="captions_per_pair=6"):
        KCFICollator(processor, captions_per_pair=6)
