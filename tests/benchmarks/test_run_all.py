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
