import math

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from kcfi.training.checkpoints import complete_checkpoints
from kcfi.training.finite import StepNumbers, broken_weights
from tests.training.test_trainer import break_gradients

SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "per_device_train_batch_size": 2}
WEIGHT = "model.change_detection_head.linear.weight"
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])


class AtStep(TrainerCallback):
    """Calls a function with the model in step 3, before the forward pass or before the weights change."""

    def __init__(self, event, act):
        self.act = act
        setattr(self, event, self.once)

    def once(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            self.act(model)


def spoil(model, value=float("nan")):
    with torch.no_grad():
        model.get_parameter(WEIGHT)[0, 0] = value


def in_precision(trainer, precision):
    """fp16 on a CPU: Accelerate leaves out scaler and autocast there, torch does not."""
    if precision == "fp16":
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    return trainer


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def broken_run(make_trainer, make_pairs, tmp_path):
    """Trains until step 3 breaks; the error, the weights behind step 2 and behind the end, and the trainer."""

    def run(event, act, precision, error):
        kept = {}

        def keep_and_act(model):
            kept["weights"] = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            kept["files"] = contents(tmp_path)
            act(model)

        options = {} if precision == "fp32" else {precision: True}
        trainer = make_trainer(make_pairs(8), callbacks=[AtStep(event, keep_and_act)], **SAVED, **options)
        with pytest.raises(FloatingPointError, match=error):
            in_precision(trainer, precision).train()
        assert contents(tmp_path) == kept["files"]  # the last checkpoint is as it was, and no other came
        assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-2"]
        return kept["weights"], dict(trainer.model.named_parameters()), trainer

    return run


@PRECISIONS
def test_a_loss_that_is_not_finite_names_step_task_and_pairs(broken_run, precision):
    error = r"Optimizer step 3: caption loss [\d.]+, mask loss nan. Pairs of the batch: pair_\d.png, pair_\d.png\. "
    before, after, _ = broken_run("on_step_begin", spoil, precision, error)
    assert all(torch.equal(after[name], weight) for name, weight in before.items() if name != WEIGHT)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_names_step_losses_and_pairs(broken_run, precision):
    error = r"Optimizer step 3: .* norm .* is (nan|inf) \(caption loss [\d.]+, mask loss [\d.]+; pairs: pair_\d.png"
    before, after, _ = broken_run("on_step_begin", break_gradients, precision, error)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_fp16_skips_steps_until_its_scale_is_not_to_blame(make_trainer, make_pairs):
    trainer = in_precision(make_trainer(make_pairs(8), max_steps=40, fp16=True), "fp16")
    break_gradients(trainer.model)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    with pytest.raises(FloatingPointError, match=r"Optimizer step 18: .* norm"):  # 2 ** 16 halved to below 1
        trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 0.5
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())


@PRECISIONS
def test_weights_that_a_step_breaks_are_named_before_they_are_saved(broken_run, precision):
    error = rf"Optimizer step 3: losses and gradient were finite, .* not: {WEIGHT} \(caption loss .*pair_\d.png"
    broken_run("on_pre_optimizer_step", lambda model: spoil(model, float("inf")), precision, error)


@pytest.mark.parametrize(
    ("part", "error"),
    [("model.projector.linear_1.bias", "caption logits"), (WEIGHT, "mask logits")],
)
def test_logits_that_are_not_finite_end_an_evaluation_and_name_step_and_pairs(
    make_trainer, make_pairs, no_java, part, error
):
    trainer = make_trainer(make_pairs(4), eval_dataset=make_pairs(4), per_device_eval_batch_size=2)
    with torch.no_grad():
        trainer.model.get_parameter(part).view(-1)[0] = float("nan")
    with pytest.raises(
        FloatingPointError,
        match=rf"Evaluation behind optimizer step 0: The {error} are not finite \(number 1, 2 of 2\).*pair_0.png",
    ):
        trainer.evaluate()


def test_only_weights_that_train_are_looked_at():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
        assert broken_weights(model) == []
        model[1].bias[1] = -math.inf
    assert broken_weights(model) == ["1.bias"]
    assert broken_weights(nn.Identity()) == []


def test_losses_of_micro_batches_are_added_up_for_the_message():
    numbers = StepNumbers()
    numbers.start(7, ["a.png"])
    for value in (1.0, 2.0):
        numbers.check_losses({"mask": torch.tensor(value)}, torch.tensor(value), ["a.png"])
    numbers.check_gradient(1.0)
    numbers.check_gradient(math.inf, scale=1.0)
    with pytest.raises(FloatingPointError, match=r"Optimizer step 7: .* is inf \(mask loss 3; pairs: a.png\)"):
        numbers.check_gradient(math.inf, scale=0.5)
