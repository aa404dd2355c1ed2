"""Who may write into an archive: one call and its workers, and nobody beside a worker that is left of another."""

import threading
import time

import pytest

from kcfi.archives import calls
from kcfi.archives.calls import join_call, only_call, wait_for_workers
from kcfi.archives.job import WORK


@pytest.fixture
def left(tmp_path):
    """The lock of a worker whose call is over."""
    with only_call(tmp_path) as call:
        lock = join_call(tmp_path, call)
    yield lock
    lock.release()


def test_a_second_call_at_the_same_time_is_refused_and_leaves_the_first_alone(tmp_path):
    with only_call(tmp_path) as call:
        with pytest.raises(ValueError, match="another call is at work there"), only_call(tmp_path):
            raise AssertionError
        join_call(tmp_path, call).release()
        with pytest.raises(ValueError, match="another call is at work there"), only_call(tmp_path):
            raise AssertionError
    with only_call(tmp_path) as another:
        assert another != call
    assert not (tmp_path / WORK).exists()


def test_no_call_begins_beside_a_worker_that_is_left_of_another(tmp_path, left, monkeypatch):
    """Failed before: the next call began at once, and both wrote."""
    monkeypatch.setattr(calls, "PATIENCE", 0.2)
    for _ in range(2):
        with pytest.raises(ValueError, match="a worker of an earlier call is still at work"), only_call(tmp_path):
            raise AssertionError
    left.release()
    with only_call(tmp_path):
        pass
    assert not (tmp_path / WORK).exists()


def test_a_call_waits_for_workers_that_are_about_to_end(tmp_path, left):
    end = threading.Timer(0.5, left.release)
    start = time.monotonic()
    end.start()
    with only_call(tmp_path):
        assert 0.4 < time.monotonic() - start < calls.PATIENCE


def test_the_end_of_a_call_can_wait_for_its_own_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(calls, "PATIENCE", 0.2)
    with only_call(tmp_path) as call:
        wait_for_workers(tmp_path)
        lock = join_call(tmp_path, call)
        with pytest.raises(ValueError, match="still at work"):
            wait_for_workers(tmp_path)
        lock.release()
        wait_for_workers(tmp_path)


def test_a_worker_that_is_late_begins_nothing(tmp_path):
    with only_call(tmp_path) as call:
        pass
    with only_call(tmp_path):
        with pytest.raises(ValueError, match="the call that started this worker has ended"):
            join_call(tmp_path, call)
        wait_for_workers(tmp_path)  # it holds nothing up
    with pytest.raises(ValueError, match="the call that started this worker has ended"):
        join_call(tmp_path, call)
