"""A run is looked at before each tile and each word, and nothing stays hooked to the model."""

import pytest

from kcfi.models import load
from kcfi.processing import Describer
from kcfi.web.limits import Refused
from kcfi.web.runs import Left, check_time, parts_of, watched


def test_what_is_raised_before_a_word_ends_the_run_and_leaves_no_hook(detector, make_pair):
    describer = Describer(*load(str(detector), device="cpu"))
    parts, times = parts_of(describer.model), []

    def check(spent):
        times.append(spent)
        if len(times) == 5:
            raise Left

    with pytest.raises(Left), watched(parts, check):
        describer.describe(*make_pair(40, 40))
    assert len(times) == 5 and times == sorted(times) and times[0] >= 0
    assert [len(part._forward_pre_hooks) for part in parts] == [0, 0]
    assert describer.describe(*make_pair(40, 40)).caption and len(times) == 5


def test_the_time_of_a_run_is_told_with_a_way_out():
    check_time(2, 2)
    with pytest.raises(Refused, match=r"longer than the 2 s .*`kcfi caption`") as caught:
        check_time(2.1, 2)
    assert caught.value.status == 504
