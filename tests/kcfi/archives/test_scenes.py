"""Lists of scenes: a report and a row per pair."""

import json
import shutil

import pytest

from kcfi_cli import main
from tests.kcfi.archives.conftest import table


@pytest.fixture
def scenes(folders, make_pair):
    """A manifest of two scenes, one of them by URL, and a pair that differs in size."""
    rows = ["name,before,after"]
    for name, square in (("one", (3, 2, 40, 30)), ("two", (30, 10, 60, 40))):
        for date, image in zip("AB", make_pair(70, 45, square=square), strict=True):
            image.save(folders / date / f"{name}.png")
        prefix = f"file://{folders}/" if name == "two" else ""
        rows.append(f"{name},{prefix}A/{name}.png,{prefix}B/{name}.png")
    rows.append("odd,A/pair_0.png,B/pair_1.png")
    (folders / "scenes.csv").write_text("\n".join(rows))
    return folders / "scenes.csv"


def test_each_scene_gets_a_report_and_a_row(scenes, detector, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["scene", str(scenes), "-o", str(output), "--model", str(detector), "--min_area", "30"]
    assert main(command) == 1
    *lines, total, _, reason = capsys.readouterr().out.splitlines()
    odd, one, two = table(output)
    assert total.startswith("2 of 3 pairs: ") and "AFTER is 20 x 28 px" not in reason and "px" in reason
    for row in (one, two):
        summary = json.loads((output / row["name"] / "summary.json").read_text())
        assert row["report"] == f"{row['name']}/report.html" and (output / row["report"]).is_file()
        assert row["caption"] == summary["caption"] and row["changes"] == len(summary["changes"]) == 1
        assert row["coverage"] == summary["coverage"] == 1 and row["error"] is None and row["area_m2"] is None
        assert f"{row['name']}: {row['caption']} ({row['report']})" in lines
    assert odd["error"] and odd["report"] is None and not (output / ".work").exists()
    assert two["before"].startswith("file://") and [p.name for p in output.glob("rows-*")][2:]  # a block per scene


def test_scenes_that_are_done_are_not_done_again_and_options_are_not_mixed(scenes, detector, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["scene", str(scenes), "-o", str(output), "--model", str(detector), "--min_area", "30", "--json"]
    assert main(command) == 1
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 3
    shutil.rmtree(output / "one")
    assert main(command) == 1 and capsys.readouterr().out == "" and not (output / "one").exists()
    assert main([*command[:-2], "40"]) == 2
    assert "was written with min_area=30.0, not 40.0" in capsys.readouterr().err


def test_a_list_has_two_dates(scenes, detector, capsys):
    folders = [str(scenes.parent / name) for name in "AB"]
    assert main(["scene", *folders, "later.png", "--model", str(detector)]) == 2
    assert "A list has two dates per scene" in capsys.readouterr().err
