import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "few_pairs.py"


def judge(folder, s_m, f1, elsewhere=None):
    folder.mkdir(parents=True)
    lines = [
        {"captions": "model", "told apart": 90.0},
        {"captions": "model", "of": "all", "s_m": s_m},
        {"captions": "model", "of": "changed", "s_m": 1.0},
        {"captions": "always the same", "of": "all", "s_m": 2.0},
        {"building": "model", "f1": f1},
        {"building": "everything changed", "f1": 3.0},
    ]
    (folder / "real_levir.json").write_text(json.dumps(lines))
    if elsewhere is not None:
        texts = ["121.png: a house .", json.dumps({"mask": "model", "f1": elsewhere}), json.dumps({"mask": "all"})]
        (folder / "whu.txt").write_text("\n".join(texts))


def run(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "judged"), "--output", str(tmp_path / "out.png")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_seeds_are_put_together_and_drawn(tmp_path):
    judge(tmp_path / "judged" / "base_0-0", 50.0, 40.0, 64.0)
    judge(tmp_path / "judged" / "all_38-0", 52.0, 60.0, 60.0)
    judge(tmp_path / "judged" / "all_38-1", 56.0, 70.0, 62.0)
    judge(tmp_path / "judged" / "frozen_tower_608-0", 57.0, 71.0)
    (tmp_path / "judged" / "notes").mkdir()
    result = run(tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[2:] == [
        "| base | 0 | 1 | 50.0 | 90.0 | 40.0 | 64.0 |",
        "| all | 38 | 2 | 54.0 ± 2.8 | 90.0 ± 0.0 | 65.0 ± 7.1 | 61.0 ± 1.4 |",
        "| frozen_tower | 608 | 1 | 57.0 | 90.0 | 71.0 | - |",
    ]
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (1600, 300)


@pytest.mark.parametrize(
    ("file", "text"),
    [("whu.txt", ""), ("real_levir.json", "[{"), ("real_levir.json", '[{"captions": "model", "told apart": 90.0}]')],
)
def test_a_file_that_is_cut_off_is_told_by_its_folder(tmp_path, file, text):
    folder = tmp_path / "judged" / "all_38-0"
    judge(folder, 52.0, 60.0)
    (folder / file).write_text(text)
    result = run(tmp_path)
    assert result.returncode == 2 and f"{folder}: real_levir.json" in result.stderr


def test_a_folder_without_judged_models_is_told(tmp_path):
    (tmp_path / "judged" / "all-0").mkdir(parents=True)
    result = run(tmp_path)
    assert result.returncode == 2 and "no folder KIND_PAIRS-SEED" in result.stderr
