import math

import pytest
import torch

from kcfi.processing import INSTRUCTIONS, InputError
from kcfi.processing.describer_kcfi import write_captions
from kcfi.training.collator import KCFICollator
from kcfi.training.data.pairs import UnreadablePairError
from kcfi.training.scoring.cider import CiderD
from kcfi.training.scst import END, GumbelNoise, SelfCritic, policy_loss, roll_out, until_end
from tests.training.conftest import CHANGED, UNCHANGED

SCST = {"objective": "scst", "dwa": "none", "generation_max_new_tokens": 8, "train_language_model": True}


def lines(trainer, *names):
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]


# Mathematics


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_a_caption_above_the_greedy_one_becomes_likelier_and_one_below_less_likely(advantage):
    logits = torch.zeros(1, 3, 5, requires_grad=True)
    labels = torch.tensor([[-100, 3, 1]])
    policy_loss(logits, labels, torch.tensor([[0.0, advantage, advantage]]), 2).backward()
    step = -logits.grad[0]
    assert (step[0, 3] > 0) == (step[1, 1] > 0) == (advantage > 0)
    assert step[0, 3].item() == pytest.approx(advantage * (1 - 1 / 5) / 2)
    assert not step[2].any()  # behind the last token


def test_the_loss_is_the_sum_of_advantage_times_surprise_over_the_tokens_of_the_step():
    logits = torch.zeros(2, 3, 4)
    labels = torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    advantages = torch.tensor([[0.0, 1.0, 1.0], [0.0, -3.0, 5.0]])
    assert policy_loss(logits, labels, advantages, 4).item() == pytest.approx((1 + 1 - 3) * math.log(4) / 4)


def test_noise_draws_from_the_softmax_whatever_stands_in_other_rows():
    scores = torch.tensor([0.0, 1.0, 2.0, 9.0]).log().nan_to_num(neginf=-1e9)
    seeds = list(range(3000))
    drawn = GumbelNoise(seeds, forbidden=3)(torch.zeros(1), scores.expand(3000, 4)).argmax(dim=1)
    shares = torch.bincount(drawn, minlength=4) / 3000
    assert shares.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 0], abs=0.03)
    alone = GumbelNoise([7], forbidden=3)(torch.zeros(1), scores[None]).argmax()
    assert alone == drawn[7]
    assert GumbelNoise([None], forbidden=3)(torch.zeros(1), scores[None]).argmax() == 2


def test_a_row_ends_with_its_first_end_token():
    assert until_end([5, 2, 0, 0], [2]) == [5, 2] and until_end([5, 6], [2]) == [5, 6]


# Captions


@pytest.fixture
def batch(processor, make_pairs):
    collator = KCFICollator(processor, seed=3, sampled=True)
    return collator([make_pairs()[index] for index in range(4)])


def test_greedy_rows_are_what_evaluation_writes_and_drawn_ones_do_not_depend_on_the_batch(model, processor, batch):
    prompts = [processor.encode_prompt(text) for text in INSTRUCTIONS[:4]]  # of several lengths
    assert len({len(prompt) for prompt in prompts}) > 1
    model.eval()

    def write(rows, seeds):
        pixels = batch["pixel_values"][rows]
        return roll_out(model, processor, pixels, [prompts[row] for row in rows], seeds, max_new_tokens=6)

    written = write([0, 1, 2, 3], [[None, 10 * row, 10 * row + 1] for row in range(4)])
    for row in range(4):
        [alone] = write([row], [[10 * row, None]])
        assert alone == [written[row][1], written[row][0]]
        with torch.no_grad():
            features = model.get_image_features(pixel_values=batch["pixel_values"][[row]], return_dict=True)
            [text], _ = write_captions(model, processor, features, torch.tensor([prompts[row]]), max_new_tokens=6)
        assert processor.post_process_image_text_to_text([alone[1]])[0].rstrip() == text
    assert written[0][1] != written[0][2]
    assert all(processor.image_token_id not in caption for rows in written for caption in rows)


@pytest.fixture
def critic(model, processor):
    captions = [UNCHANGED, [caption.format("left") for caption in CHANGED], []]
    return SelfCritic(model, processor, captions, samples=3, max_new_tokens=6, seed=0)


def test_a_reward_is_the_cider_d_of_the_caption_with_a_word_for_its_end(critic, processor):
    references = [caption.format("left") for caption in CHANGED]
    corpus = [[f"{text.removesuffix(' .')} {END}" for text in one] for one in (UNCHANGED, references)]
    cider = CiderD(corpus)
    whole = processor.encode_caption("a house appears in the left .")
    assert critic.reward(whole, references) == pytest.approx(cider(f"a house appears in the left {END}", corpus[1]))
    cut = processor.encode_caption("a house appears in the left .")[:-2]
    assert critic.reward(cut, references) == pytest.approx(cider("a house appears in the left", corpus[1]))
    assert critic.reward(cut, references) < critic.reward(whole, references)


def test_a_batch_gets_the_captions_drawn_and_each_of_their_tokens_its_advantage(critic, processor, batch):
    batch["references"][2] = []
    made = critic.write(batch, step=5)
    assert made["segment_ids"].max() == 3 and not (made["labels"][2] != -100).any()
    assert "prompts" not in made and made["filenames"] == batch["filenames"]
    seeds = [[None, *critic._seeds(name, 5)] for name in batch["filenames"]]
    written = roll_out(critic.model, processor, batch["pixel_values"], batch["prompts"], seeds, 6)
    for row in (0, 1, 3):
        greedy = critic.reward(written[row][0], batch["references"][row])
        for segment in (1, 2, 3):
            tokens = (made["segment_ids"][row] == segment) & (made["labels"][row] != -100)
            assert made["labels"][row][tokens].tolist() == written[row][segment]
            expected = critic.reward(written[row][segment], batch["references"][row]) - greedy
            assert made["advantages"][row][tokens].tolist() == pytest.approx([expected] * len(written[row][segment]))
    again, later = critic.write(batch, step=5), critic.write(batch, step=6)
    assert torch.equal(again["input_ids"], made["input_ids"])
    assert again["input_ids"].shape != later["input_ids"].shape or not torch.equal(
        again["input_ids"], later["input_ids"]
    )


# Training


def test_gradients_do_not_depend_on_how_a_step_is_cut(make_trainer, make_pairs):
    found = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = make_trainer(
            make_pairs(), max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **SCST
        )
        trainer.train()
        found.append(lines(trainer, "caption_loss", "mask_loss", "reward", "greedy_reward", "grad_norm"))
    assert found[0] == [pytest.approx(line, rel=1e-3, abs=1e-6) for line in found[1]]


def test_a_toy_that_begins_with_random_words_is_rewarded_more_and_masks_are_learned_beside(make_trainer, make_pairs):
    settings = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer = make_trainer(make_pairs(), max_steps=40, per_device_train_batch_size=8, **{**SCST, **settings})
    trainer.train()
    log = lines(trainer, "reward", "mask_loss", "mask_weight")
    start, end = ([sum(column) / 10 for column in zip(*part, strict=True)] for part in (log[:10], log[-10:]))
    assert end[0] > start[0] + 8, (start, end)
    assert end[1] < 0.5 * start[1] and end[2] == 1


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_has_bit_identical_losses(make_trainer, make_pairs, stop):
    settings = {**SCST, "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "logging_steps": 2}
    whole = make_trainer(make_pairs(), **settings)
    whole.train()
    folder = whole.args.output_dir
    again = make_trainer(make_pairs(), **settings)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-{stop}")
    names = ("loss", "caption_loss", "mask_loss", "reward", "greedy_reward")
    assert lines(again, *names) == lines(whole, *names)


def test_a_first_stage_is_gone_on_from(make_trainer, make_pairs):
    settings = {**SCST, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    first = make_trainer(make_pairs(), **{**settings, "objective": "cross_entropy"})
    first.train()
    second = make_trainer(make_pairs(), **settings)
    second.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-2")
    assert "reward" not in first.state.log_history[-2] and "reward" in second.state.log_history[-2]


def test_pairs_that_cannot_be_read_are_stood_in_for_where_words_are_weighed_too(make_trainer, make_pairs):
    class Broken(make_pairs):
        def __getitem__(self, index):
            if index == 3:
                raise UnreadablePairError("pair_3.png is broken.")
            return super().__getitem__(index)

    trainer = make_trainer(Broken(), max_steps=2, max_unreadable=0.5, **SCST)
    trainer.train()
    assert len(lines(trainer, "reward")) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dwa": "window"}, "objective=scst: dwa=window compares a loss"),
        ({"use_liger_kernel": True}, "objective=scst: use_liger_kernel"),
        ({"fsdp": True}, "objective=scst: a model that is split .* leave out fsdp"),
    ],
)
def test_what_it_cannot_follow_is_refused_by_name(make_trainer, make_pairs, settings, message):
    with pytest.raises(InputError, match=message):
        make_trainer(make_pairs(), **{**SCST, **settings})


def test_pairs_without_a_sentence_are_refused(make_trainer, make_pairs):
    with pytest.raises(InputError, match="no training pair has a sentence"):
        make_trainer(make_pairs(captions="none"), max_steps=1, **SCST).train()
