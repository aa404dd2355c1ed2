"""Runs end in time, and when nobody waits; nothing stays hooked to the model."""

import pytest

from kcfi.demo import runs as module
from kcfi.demo.limits import Limits
from kcfi.demo.runs import Runs
from kcfi.models import load
from kcfi.processing import Describer
from kcfi.web.limits import Refused
from kcfi.web.runs import Left


@pytest.fixture
def describer(detector):
    return Describer(*load(str(detector), device="cpu"))


def hooks(runs):
    return [len(part._forward_pre_hooks) for part in runs.parts]


def test_a_run_in_time_gives_the_same_answer(describer, make_pair):
    pair = make_pair(40, 40, (4, 4, 20, 20))
    plain = describer.describe(*pair)
    runs = Runs(describer.model, Limits())
    with runs.run(None):
        assert describer.describe(*pair).caption == plain.caption
        assert hooks(runs) == [1, 1]
    assert hooks(runs) == [0, 0]


def test_a_run_that_takes_too_long_is_ended_before_the_next_tile(describer, make_pair):
    runs, tiles = Runs(describer.model, Limits(seconds=1e-9)), []
    handle = describer.model.model.vision_tower.register_forward_hook(lambda *_: tiles.append(1))
    with pytest.raises(Refused, match="longer than the 1e-09 s") as caught, runs.run(None):
        describer.describe(*make_pair(400, 400))
    handle.remove()
    assert caught.value.status == 504 and tiles == [] and hooks(runs) == [0, 0]


def test_a_run_ends_when_its_session_stops_listening(describer, make_pair):
    runs, tiles = Runs(describer.model, Limits()), []
    with pytest.raises(Left), runs.run("a"):
        with runs.listen("b"), runs.listen("a"):
            describer.describe(*make_pair(40, 40))
            tiles.append("described")
        describer.describe(*make_pair(40, 40))
        tiles.append("described again")
    assert tiles == ["described"] and hooks(runs) == [0, 0] and not runs.listening


def test_two_streams_of_a_session_are_one_listener(describer):
    runs = Runs(describer.model, Limits())
    with runs.listen("a"):
        with runs.listen("a"):
            assert runs.listening["a"] == 2
        assert runs.listening["a"] == 1
    assert "a" not in runs.listening


def test_who_never_listens_is_not_waited_for(describer, make_pair, monkeypatch):
    runs = Runs(describer.model, Limits())
    with runs.run("a"):  # not yet
        describer.describe(*make_pair(40, 40))
    monkeypatch.setattr(module, "OPENED", -1)
    with pytest.raises(Left), runs.run("a"):
        describer.describe(*make_pair(40, 40))
