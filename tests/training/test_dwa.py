import json
import math

import pytest

from kcfi.training.dwa import DynamicWeightAverage, dwa_weights


def run(dwa, losses):
    weights = []
    for caption, mask in losses:
        weights.append(dwa.weights)
        dwa.update({task: loss for task, loss in (("caption", caption), ("mask", mask)) if loss is not None})
    return [*weights, dwa.weights]


def test_weights_are_those_of_equation_10():
    # speeds 0.5 and 1.0 at T = 2: exp(0.25) and exp(0.5)
    first, second = math.exp(0.25), math.exp(0.5)
    expected = [2 * first / (first + second), 2 * second / (first + second)]
    assert dwa_weights([1.0, 3.0], [2.0, 3.0], 2.0) == pytest.approx(expected, rel=1e-6)


def test_three_tasks_share_a_total_weight_of_three():
    weights = dwa_weights([1.0, 1.0, 2.0], [1.0, 2.0, 1.0], 1.0)
    assert sum(weights) == pytest.approx(3.0)
    assert weights[1] < weights[0] < weights[2]


@pytest.mark.parametrize("temperature", [0.2, 2.0])
def test_vanishing_and_exploding_losses_give_finite_weights(temperature):
    assert dwa_weights([0.0, 0.0], [0.0, 0.0], temperature) == [1.0, 1.0]
    for previous, before in [([1e-12, 1.0], [1.0, 1e-12]), ([1e9, 1.0], [1e-9, 1.0])]:
        weights = dwa_weights(previous, before, temperature)
        assert all(math.isfinite(weight) for weight in weights)
        assert sum(weights) == pytest.approx(2.0)


def test_weights_are_one_until_two_averaged_losses_exist():
    weights = run(DynamicWeightAverage(temperature=0.2), [(4.0, 1.0), (2.0, 1.0)])
    even = {"caption": 1.0, "mask": 1.0}
    assert weights[:2] == [even, even]
    assert list(weights[2].values()) == pytest.approx(dwa_weights([2.0, 1.0], [4.0, 1.0], 0.2))


def test_a_window_averages_its_steps_before_the_ratio():
    weights = run(DynamicWeightAverage(temperature=2.0, window=2), [(4.0, 1.0), (2.0, 3.0), (1.0, 1.0), (2.0, 2.0)])
    assert all(weight == {"caption": 1.0, "mask": 1.0} for weight in weights[:4])
    assert list(weights[4].values()) == pytest.approx(dwa_weights([1.5, 1.5], [3.0, 2.0], 2.0))


def test_a_task_absent_from_a_window_keeps_its_last_averaged_loss():
    dwa = DynamicWeightAverage(temperature=2.0)
    run(dwa, [(4.0, 1.0), (2.0, 0.5), (1.0, None)])
    assert list(dwa.weights.values()) == pytest.approx(dwa_weights([1.0, 0.5], [2.0, 0.5], 2.0))
    dwa = DynamicWeightAverage(temperature=2.0)
    run(dwa, [(4.0, 1.0), (2.0, 0.5), (None, 0.2)])
    assert list(dwa.weights.values()) == pytest.approx(dwa_weights([2.0, 0.2], [2.0, 0.5], 2.0))


def test_a_task_absent_from_some_steps_of_a_window_is_averaged_over_the_others():
    dwa = DynamicWeightAverage(temperature=2.0, window=2)
    run(dwa, [(1.0, 2.0), (1.0, None)])
    assert dwa.previous == {"caption": 1.0, "mask": 2.0}


def test_captions_alone_and_masks_alone_keep_the_weight_one():
    for losses in ([(4.0, None), (2.0, None), (1.0, None)], [(None, 4.0), (None, 2.0), (None, 1.0)]):
        assert all(set(weight.values()) == {1.0} for weight in run(DynamicWeightAverage(), losses))


def test_a_state_restored_from_json_gives_exactly_the_same_weights():
    losses = [(1 / (step + 1), 1 / (step + 3)) for step in range(9)]
    uninterrupted = DynamicWeightAverage(temperature=0.2, window=2)
    expected = run(uninterrupted, losses)

    stopped = DynamicWeightAverage(temperature=0.2, window=2)
    run(stopped, losses[:5])
    restored = DynamicWeightAverage(temperature=0.2, window=2)
    restored.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert run(restored, losses[5:]) == expected[5:]
