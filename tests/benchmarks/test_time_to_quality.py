import pytest

pytest.importorskip("matplotlib")
import json

import time_to_quality


def test_seconds_are_those_of_training_alone(tmp_path):
    lines = [
        {"pairs": 40, "pairs_per_second": 4.0},
        {"eval_s_m": 50.0},
        {"pairs": 60, "pairs_per_second": 2.0},
        {"eval_s_m": 60.0},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": lines}))
    assert [line["seconds"] for line in time_to_quality.history(tmp_path)] == [10, 10, 20, 20]


def test_a_loss_is_reached_between_two_evaluations():
    curve = [{"seconds": 10.0, "eval_caption_loss": 1.5}, {"seconds": 20.0, "eval_caption_loss": 0.5}]
    assert time_to_quality.reached(curve, 2.0) == 10.0
    assert time_to_quality.reached(curve, 0.8) == pytest.approx(17.0)
    assert time_to_quality.reached(curve, 0.4) is None
