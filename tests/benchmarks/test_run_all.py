import json
import re
import sys

import compare
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


def test_a_run_leaves_a_file_that_the_next_one_is_compared_with(tmp_path, monkeypatch, capsys):
    script = 'print(\'noise\'); print(\'{"benchmark": "one", "machine": %s, "rows": [%s]}\')'
    machine = {"threads": 1, "cores": 2, "cpu": "abacus", "torch": "2", "load": 0.0}
    row = {"case": "c", "unit": "x/s", "plain": 1, "ours": 2, "ratio": 2, "spread": [1, 3], "bar": None, "equal": "-"}
    row |= {"peak_mib": [], "gflop": [], "of_peak": []}
    (tmp_path / "one.py").write_text(script % (json.dumps(machine), json.dumps(row)))
    page = tmp_path / "page.md"
    page.write_text(run_all.BEGIN + run_all.END)
    for name, value in {"FOLDER": tmp_path, "PAGE": page, "NAMES": ["one"]}.items():
        monkeypatch.setattr(run_all, name, value)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--output", str(tmp_path / "results")])
    run_all.main()
    [file] = (tmp_path / "results").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d{6}\.json", file.name)
    run = json.loads(file.read_text())
    assert run["reports"][0]["machine"] == machine and run["reports"][0]["seconds"] > 0 and run["commit"]
    assert "| c | 1 x/s | 2 | **2.0** (1.0 to 3.0) | - |" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["compare.py", str(file), str(file)])
    compare.main()
    assert "one, c: ratio 2.00 -> 2.00, ours 2 -> 2 x/s (+0 %)" in capsys.readouterr().out
