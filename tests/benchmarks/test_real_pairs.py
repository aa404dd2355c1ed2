"""The figures of real pairs, on pairs made here whose scores can be counted by hand."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "real_pairs.py"


@pytest.fixture
def folders(tmp_path, make_pair):
    """`one` holds a pair that the detector marks as labelled, `two` one with twice the label, and one without."""
    pairs = {
        "one/a": ((0, 0, 16, 16), (0, 0, 16, 16)),
        "two/b": ((0, 0, 16, 16), (0, 0, 16, 32)),
        "two/c": (None, (0, 0, 32, 32)),
    }
    for name, (changed, labelled) in pairs.items():
        folder, stem = name.split("/")
        label = np.zeros((64, 64), np.uint8)
        label[labelled[1] : labelled[3], labelled[0] : labelled[2]] = 255
        for date, picture in zip(
            ("A", "B", "label"), (*make_pair(64, 64, changed), Image.fromarray(label)), strict=True
        ):
            (tmp_path / folder / date).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / folder / date / f"{stem}.png")
    return [tmp_path / "one", tmp_path / "two"]


def run(*options):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, options)], capture_output=True, text=True, check=False
    )


def test_scores_are_accumulated_per_folder_and_over_all_but_what_is_left_out(folders, detector, tmp_path):
    done = run(*folders, "--model", detector, "--leave_out", "c", "--output", tmp_path / "sheets")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {(Path(line["folder"]).name, line["mask"]): (line["images"], line["f1"]) for line in lines}

    def f1(hit, marked, labelled):
        return round(200 * hit / (marked + labelled), 1)

    everything = 64 * 64
    assert found["two", "everything changed"] == (2, f1(512 + 1024, 2 * everything, 512 + 1024))
    assert found["all", "everything changed"] == (2, f1(256 + 512, 2 * everything, 256 + 512))
    one, two, both = (found[name, "model"] for name in ("one", "two", "all"))
    assert (one[0], two[0], both[0]) == (1, 2, 2)
    assert one[1] > both[1] > two[1] > 0  # the labels are met, half met, and missed in c, which "all" leaves out
    assert len(list((tmp_path / "sheets").iterdir())) == 2


def test_a_name_to_leave_out_that_is_nowhere_is_refused(folders, detector):
    done = run(folders[0], "--model", detector, "--leave_out", "nothing")
    assert done.returncode == 2 and "--leave_out nothing: no such image" in done.stderr
