import pytest

from kcfi.training import throughput
from kcfi.training.throughput import Throughput


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_speed_is_that_since_the_last_line_and_counts_are_those_of_the_run(clock):
    speed = Throughput()
    speed.start()
    speed.count(8, 40)
    clock[0] = 4.0
    assert speed.logs() == {"pairs": 8, "captions": 40, "pairs_per_second": 2, "captions_per_second": 10}
    speed.count(4, 4)
    clock[0] = 5.0
    assert speed.logs() == {"pairs": 12, "captions": 44, "pairs_per_second": 4, "captions_per_second": 4}


def test_evaluation_does_not_count(clock):
    speed = Throughput()
    speed.start()
    speed.count(6, 6)
    clock[0] = 1.0
    with speed.paused():
        clock[0] = 11.0
    clock[0] = 12.0
    assert speed.logs()["pairs_per_second"] == 3


def test_what_lies_between_two_trainings_does_not_count(clock):
    speed = Throughput()
    speed.start()
    speed.count(5, 5)
    speed.stop()
    clock[0] = 100.0
    speed.start()
    speed.count(6, 6)
    clock[0] = 102.0
    assert speed.logs()["pairs_per_second"] == 3
