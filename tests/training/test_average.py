import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, TrainerCallback

from kcfi.processing import InputError
from kcfi.training.average import AVERAGE_FILE, START, WeightAverage
from tests.training.conftest import arguments


class Weights(TrainerCallback):
    """Keeps one weight behind every optimizer step."""

    def __init__(self, name):
        self.name, self.found = name, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.found.append(model.get_parameter(self.name).detach().clone())


NAME = "model.projector.linear_1.weight"


def averaged(start, weights, decay):
    """The average by hand."""
    for step, weight in enumerate(weights):
        kept = min(decay, (1 + step) / (START + step))
        start = kept * start + (1 - kept) * weight
    return start


def test_an_average_moves_towards_the_weights_and_leaves_frozen_ones_alone():
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, 0.5)
    start = model.weight.detach().clone()
    found = []
    for step in range(30):
        with torch.no_grad():
            model.weight.add_(1)
        found.append(model.weight.detach().clone())
        average.update(step)
    assert average.weights.keys() == {"weight"}
    torch.testing.assert_close(average.weights["weight"], averaged(start, found, 0.5))
    with average.in_place():
        assert not torch.equal(model.weight, found[-1])
    assert torch.equal(model.weight, found[-1])


def test_a_run_ends_with_the_average_and_trains_as_if_there_were_none(model, make_trainer, make_pairs):
    start = model.get_parameter(NAME).detach().clone()
    weights = Weights(NAME)
    trainer = make_trainer(make_pairs(), callbacks=[weights], max_steps=5, ema_decay=0.9)
    trainer.train()
    torch.testing.assert_close(trainer.model.get_parameter(NAME), averaged(start, weights.found, 0.9))
    plain = Weights(NAME)
    make_trainer(make_pairs(), callbacks=[plain], max_steps=5).train()
    assert all(torch.equal(one, other) for one, other in zip(weights.found, plain.found, strict=True))
    assert trainer.average is None  # evaluation behind the training must not take it out again


SAVED = {"max_steps": 6, "ema_decay": 0.9, "save_strategy": "steps", "save_steps": 2}
SCORED = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}


@pytest.mark.parametrize("choice", ["first", "last"])
def test_evaluation_and_choice_are_of_the_average(make_trainer, make_pairs, no_java, choice):
    better = choice == "first"  # a loss that falls is best, if more is better, where it was first
    pairs, scored = make_pairs(), {**SAVED, **SCORED, "greater_is_better": better}
    trainer = make_trainer(pairs, eval_dataset=make_pairs(4), **scored)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    kept = load_file(f"{best}/{AVERAGE_FILE}")
    ended = dict(trainer.model.named_parameters())
    assert all(torch.equal(ended[name], weight) for name, weight in kept.items()) and NAME in kept
    raw = AutoModelForImageTextToText.from_pretrained(best)
    assert not torch.equal(raw.get_parameter(NAME), kept[NAME])
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert losses[trainer.state.best_global_step] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_of_several_evaluation_sets_each_sees_the_average(make_trainer, make_pairs, no_java):
    settings = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": False}
    settings |= {"max_steps": 3, "ema_decay": 0.9, "metric_for_best_model": "one_loss"}
    sets = {"one": make_pairs(4), "other": make_pairs(4)}
    trainer = make_trainer(make_pairs(), eval_dataset=sets, **settings)
    trainer.train()
    during = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    behind = trainer.evaluate()  # of the average, with which the run has ended
    for name in ("eval_one_loss", "eval_other_loss"):
        assert during[name] == pytest.approx(behind[name], rel=1e-5)


def test_a_checkpoint_without_an_average_is_refused_by_name(make_trainer, make_pairs):
    plain = make_trainer(make_pairs(), **{**SAVED, "ema_decay": 0.0, "max_steps": 2})
    plain.train()
    with pytest.raises(InputError, match=r"average\.safetensors is missing: the run began without ema_decay"):
        make_trainer(make_pairs(), **SAVED).train(resume_from_checkpoint=f"{plain.args.output_dir}/checkpoint-2")


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_ends_with_the_same_average(make_trainer, make_pairs, stop):
    whole, again = make_trainer(make_pairs(), **SAVED), make_trainer(make_pairs(), **SAVED)
    whole.train()
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{stop}")
    others = dict(again.model.named_parameters())
    assert all(torch.equal(weight, others[name]) for name, weight in whole.model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"ema_decay": 1.0}, "ema_decay=1.0 must be"), ({"ema_decay": 0.9, "fsdp": True}, "split among processes")],
)
def test_what_cannot_be_averaged_is_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        arguments(tmp_path, **settings)
