from types import SimpleNamespace

import pytest
import torch

from kcfi.training.dwa import DynamicWeightAverage
from kcfi.training.losses import LossBalance

CPU = torch.device("cpu")


def outputs(caption, mask=None):
    """Losses as the model returns them: of the captions divided by the tokens of the step, of the mask a mean."""
    return SimpleNamespace(caption_loss=torch.tensor(caption), mask_loss=None if mask is None else torch.tensor(mask))


def labels(pixels):
    """A mask of four pixels, so many of them labelled."""
    return torch.tensor([0] * pixels + [255] * (4 - pixels)).view(1, 2, 2)


def step(balance, caption, mask):
    balance.start(tokens=4, pixels=4)
    balance.weigh(balance.share(outputs(caption, mask), labels(4)))
    return balance.finish(lambda sums: sums, CPU)


def test_shares_of_micro_batches_add_up_to_means_over_the_step():
    balance = LossBalance()
    balance.start(tokens=10, pixels=4)
    total = balance.weigh(balance.share(outputs(0.25, 2.0), labels(1)))
    total = total + balance.weigh(balance.share(outputs(0.5, 4.0), labels(3)))
    assert balance.finish(lambda sums: sums, CPU) == []
    assert total.item() == pytest.approx(0.75 + (1 * 2.0 + 3 * 4.0) / 4)
    assert balance.logs() == {"caption_loss": 0.75, "caption_weight": 1, "mask_loss": 3.5, "mask_weight": 1}


def test_losses_are_added_up_over_the_ranks():
    balance = LossBalance()
    balance.start(tokens=4, pixels=4)
    balance.weigh(balance.share(outputs(1.0, 2.0), labels(4)))
    balance.finish(lambda sums: 2 * sums, CPU)
    assert balance.logs()["caption_loss"] == 2 and balance.logs() == {}  # every step is logged once


def test_a_task_without_labels_is_named_and_neither_logged_nor_weighed():
    balance = LossBalance(DynamicWeightAverage())
    balance.start(tokens=3, pixels=0)
    balance.weigh(balance.share(outputs(1.0), None))
    assert balance.finish(lambda sums: sums, CPU) == ["mask"]
    assert balance.logs().keys() == {"caption_loss", "caption_weight"} and "mask" not in balance.dwa.previous


def test_the_weights_of_a_line_are_those_of_its_last_step_and_a_restored_balance_goes_on_alike():
    balance, again = LossBalance(DynamicWeightAverage(2.0)), LossBalance(DynamicWeightAverage(2.0))
    for caption, mask in ((4.0, 2.0), (2.0, 2.0), (1.0, 2.0)):
        before = balance.weights
        step(balance, caption, mask)
    assert balance.logs()["caption_weight"] == before["caption"] != balance.weights["caption"]
    again.load_state_dict(balance.state_dict())
    assert again.weights == balance.weights
    step(again, 3.0, 1.0)
    step(balance, 3.0, 1.0)
    assert again.weights == balance.weights


def test_without_dynamic_weights_the_losses_since_the_last_log_are_all_there_is_to_save():
    assert LossBalance().state_dict() == {"logged": {"caption": [], "mask": []}}
