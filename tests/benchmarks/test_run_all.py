import json
import re
import subprocess
import sys

import compare
import pytest
import run_all


def test_the_tables_replace_what_stood_between_the_marks():
    row = {
        "case": "c",
        "unit": "x/s",
        "plain": 1.0,
        "ours": 2.0,
        "ratio": 2.0,
        "spread": [1, 3],
        "bar": 1,
        "equal": "-",
        "peak_mib": [],
        "gflop": [],
        "of_peak": [],
    }
    machine = {"threads": 1, "cpu": "abacus", "torch": "2", "load": 0.0}
    report = {"benchmark": "one", "machine": machine, "rows": [row], "seconds": 61.4}
    page = run_all.with_tables(f"before\n{run_all.BEGIN}old\n{run_all.END}behind\n", [report])
    assert page.startswith(f"before\n{run_all.BEGIN}1 threads of abacus") and page.endswith(f"{run_all.END}behind\n")
    assert "old" not in page and "| c | 1 x/s | 2 |" in page and "`python benchmarks/one.py`, 61 s" in page
    assert run_all.with_tables(page, [report]) == page


def test_the_page_has_the_marks_and_the_benchmarks_are_there():
    page = run_all.PAGE.read_text(encoding="utf-8")
    assert page.count(run_all.BEGIN) == page.count(run_all.END) == 1
    assert all((run_all.FOLDER / f"{name}.py").is_file() for name in run_all.NAMES)


MACHINE = {"threads": 1, "cores": 2, "cpu": "abacus", "torch": "2", "load": 0.0}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page without tables, and one part that works: "one"."""
    row = {"case": "c", "unit": "x/s", "plain": 1, "ours": 2, "ratio": 2, "spread": [1, 3], "bar": None, "equal": "-"}
    row |= {"peak_mib": [], "gflop": [], "of_peak": []}
    report = {"benchmark": "one", "machine": MACHINE, "rows": [row]}
    (tmp_path / "one.py").write_text(f"print('noise')\nprint({json.dumps(report)!r})")
    file = tmp_path / "page.md"
    file.write_text(run_all.BEGIN + run_all.END)
    for name, value in {"FOLDER": tmp_path, "PAGE": file, "NAMES": ["one"]}.items():
        monkeypatch.setattr(run_all, name, value)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--output", str(tmp_path / "results")])
    return file


def test_a_run_leaves_a_file_that_the_next_one_is_compared_with(page, tmp_path, monkeypatch, capsys):
    run_all.main()
    assert "| c | 1 x/s | 2 |" in capsys.readouterr().out  # part by part
    [file] = (tmp_path / "results").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d{6}\.json", file.name)
    run = json.loads(file.read_text())
    assert run["reports"][0]["machine"] == MACHINE and run["reports"][0]["seconds"] > 0 and run["commit"]
    assert "| c | 1 x/s | 2 | **2.0** (1.0 to 3.0) | - |" in page.read_text() and run["failed"] == {}
    monkeypatch.setattr(sys, "argv", ["compare.py", str(file), str(file)])
    compare.main()
    assert "one, c: ratio 2.00 -> 2.00, ours 2 -> 2 x/s (+0 %)" in capsys.readouterr().out


def test_a_part_that_fails_is_noted_and_the_others_go_on(page, tmp_path, monkeypatch, capsys):
    (tmp_path / "two.py").write_text("assert False, 'the masks differ'")
    monkeypatch.setattr(run_all, "NAMES", ["two", "one"])
    with pytest.raises(SystemExit, match=r"two failed: page\.md keeps the tables that it has"):
        run_all.main()
    assert "AssertionError: the masks differ\ntwo: failed after" in capsys.readouterr().out
    [file] = (tmp_path / "results").iterdir()
    run = json.loads(file.read_text())
    assert run["failed"] == {"two": "exit status 1: AssertionError: the masks differ"}
    assert [report["benchmark"] for report in run["reports"]] == [
        "one"
    ] and page.read_text() == run_all.BEGIN + run_all.END


@pytest.mark.parametrize(
    ("script", "noted"),
    [
        ("import os; os.write(2, b'UserWarning: harmless'); os.kill(os.getpid(), 9)", "exit status -9: UserWarning"),
        ("pass", "exit status 0: nothing was printed"),
    ],
)
def test_a_part_that_is_killed_or_silent_has_failed(page, tmp_path, monkeypatch, script, noted):
    (tmp_path / "two.py").write_text(script)
    monkeypatch.setattr(run_all, "NAMES", ["two", "one"])
    with pytest.raises(SystemExit, match="two failed"):
        run_all.main()
    [file] = (tmp_path / "results").iterdir()  # written as a whole: no part of it lies beside
    run = json.loads(file.read_text())
    assert run["failed"]["two"].startswith(noted) and len(run["reports"]) == 1


def test_a_run_that_is_stopped_keeps_the_parts_that_it_has(page, tmp_path, monkeypatch):
    run_part = subprocess.run

    def stop(command, **settings):
        if command[1].endswith("two.py"):
            raise KeyboardInterrupt
        return run_part(command, **settings)

    monkeypatch.setattr(run_all, "NAMES", ["one", "two"])
    monkeypatch.setattr(subprocess, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        run_all.main()
    [file] = (tmp_path / "results").iterdir()
    assert [report["benchmark"] for report in json.loads(file.read_text())["reports"]] == ["one"]
