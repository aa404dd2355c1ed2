import json

import measure
import pytest
import torch
from torch.nn import functional as F


def test_sides_take_turns():
    order = []
    rounds = measure.take_turns({"plain": lambda: order.append("plain"), "ours": lambda: order.append("ours")}, 3)
    assert order == ["plain", "ours"] * 3 and rounds.peaks == {}
    assert [len(times) for times in rounds.seconds.values()] == [3, 3] and min(map(min, rounds.seconds.values())) > 0


def test_the_warm_up_counts_products_attention_and_grouped_convolutions():
    states, images = torch.ones(2, 6, 50, 16, requires_grad=True), torch.ones(1, 8, 10, 10, requires_grad=True)
    weights = torch.ones(8, 1, 3, 3, requires_grad=True)  # a filter per channel
    sides = {
        "product": lambda: torch.ones(3, 4) @ torch.ones(4, 5),
        "attention": lambda: F.scaled_dot_product_attention(states, states, states),
        "attention and back": lambda: F.scaled_dot_product_attention(states, states, states).sum().backward(),
        "convolution": lambda: F.conv2d(images, weights, padding=1, groups=8),
        "convolution and back": lambda: F.conv2d(images, weights, padding=1, groups=8).sum().backward(),
        "first convolution and back": lambda: F.conv2d(images.detach(), weights, groups=8).sum().backward(),
    }
    results, operations = measure.warm_up(sides)
    assert results["product"].tolist() == [[4.0] * 5] * 3
    attention, convolution = 2 * 2 * (2 * 6 * 50 * 50 * 16), 2 * 8 * 10 * 10 * 9
    assert operations == {
        "product": 2 * 3 * 4 * 5,
        "attention": attention,
        "attention and back": attention * 7 // 2,  # the kernel computes the scores again
        "convolution": convolution,
        "convolution and back": 3 * convolution,
        "first convolution and back": 2 * (2 * 8 * 8 * 8 * 9),
    }


def test_a_row_has_the_ratio_of_the_medians_its_spread_and_the_share_of_the_peak():
    seconds = {"plain": [8.0, 6.0, 30.0], "ours": [2.0, 2.0, 3.0]}
    work = {"plain": 16_000_000_000, "ours": 2_000_000_000}
    rounds = measure.Rounds(seconds, {"plain": 2000.4, "ours": 10.0})
    row = measure.comparison("small", rounds, 16, "pairs/s", 3.0, "the same", work, 4e9)
    assert (row["plain"], row["ours"], row["ratio"], row["spread"]) == (2.0, 8.0, 4.0, [3.0, 10.0])
    [_, _, line] = measure.table([row]).splitlines()
    expected = (
        "| small | 2 pairs/s | 8 | **4.0** (3.0 to 10.0) | 3.0 | 16 / 2 | 50% / 25% | 2,000 / 10 MiB | the same |"
    )
    assert line == expected


def test_a_row_without_a_models_work_has_no_share_of_the_peak():
    rounds = measure.Rounds({"plain": [2.0], "ours": [1.0]}, {})
    row = measure.comparison("start", rounds, 1, "starts/s", 0.9)
    [_, _, line] = measure.table([row]).splitlines()
    assert line == "| start | 0.5 starts/s | 1 | **2.0** (2.0 to 2.0) | 0.9 |  |  |  | - |"


def test_the_report_as_json_names_the_machine(capsys):
    measure.report("nothing", [], as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["benchmark"] == "nothing" and report["rows"] == [] and report["machine"]["cores"] >= 1


@pytest.mark.skipif(not measure.PEAK.exists(), reason="Linux tells the peak")
def test_the_peak_is_what_a_side_takes_beyond_the_loaded_model():
    def side(mib):
        memory = bytearray(mib * 2**20)
        memory[::4096] = b"x" * len(memory[::4096])

    side(400)  # the process has had a larger peak before
    loaded = measure.loaded_memory()
    sides = {"plain": lambda: side(200), "ours": lambda: side(100)}
    peaks = measure.take_turns(sides, 1, loaded).peaks
    # a system that is short of memory takes pages of files back meanwhile: some MiB
    assert peaks["plain"] == pytest.approx(200, abs=40) and peaks["ours"] == pytest.approx(100, abs=40)
