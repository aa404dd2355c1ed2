import json
from pathlib import Path

import measure
import pytest


def test_sides_take_turns_after_a_warm_up():
    order = []
    seconds = measure.take_turns({"plain": lambda: order.append("plain"), "ours": lambda: order.append("ours")}, 3)
    assert order == ["plain", "ours"] * 4
    assert [len(times) for times in seconds.values()] == [3, 3] and min(map(min, seconds.values())) > 0


def test_a_row_has_the_ratio_of_the_medians_and_its_spread():
    row = measure.comparison("small", {"plain": [8.0, 6.0, 30.0], "ours": [2.0, 2.0, 3.0]}, 16, "pairs/s", 3.0)
    assert (row["plain"], row["ours"], row["ratio"], row["spread"]) == (2.0, 8.0, 4.0, [3.0, 10.0])
    [_, _, line] = measure.table([{**row, "equal": "the same", "peak_mib": [2000.4, 10.0]}]).splitlines()
    assert line == "| small | 2 pairs/s | 8 | **4.0** (3.0 to 10.0) | 3.0 | 2,000 / 10 MiB | the same |"


def test_the_report_as_json_names_the_machine(capsys):
    measure.report("nothing", [], as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["benchmark"] == "nothing" and report["rows"] == [] and report["machine"]["cores"] >= 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_the_peak_is_what_a_side_adds(capsys):
    ballast = bytearray(200 * 2**20)  # the process has had a larger peak before
    ballast[::4096] = b"x" * len(ballast[::4096])
    del ballast

    def side():
        memory = bytearray(50 * 2**20)
        memory[::4096] = b"x" * len(memory[::4096])

    measure.print_peak(side)
    assert float(capsys.readouterr().out) == pytest.approx(50, abs=10)
