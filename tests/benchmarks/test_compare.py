import json
import sys

import compare
import pytest


def write(folder, name, began, **cases):
    rows = [{"case": case, "ratio": ratio, "ours": ours, "unit": "x/s"} for case, (ratio, ours) in cases.items()]
    machine = {"cpu": "abacus", "threads": 1, "cores": 2, "torch": "2", "load": 0.5}
    report = {"benchmark": "b", "machine": machine, "rows": rows}
    (folder / name).write_text(json.dumps({"began": began, "commit": "c0ffee", "reports": [report]}))
    return str(folder / name)


def test_what_moved_is_printed_by_case(tmp_path, monkeypatch, capsys):
    old = write(tmp_path, "old.json", "monday", same=(4.0, 10.0), gone=(1.0, 1.0))
    new = write(tmp_path, "new.json", "tuesday", same=(5.0, 12.0))
    monkeypatch.setattr(sys, "argv", ["compare.py", old, new])
    compare.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "old.json: monday, commit c0ffee, 1 of 2 cores of abacus, torch 2, load 0.5",
        "new.json: tuesday, commit c0ffee, 1 of 2 cores of abacus, torch 2, load 0.5",
        "b, same: ratio 4.00 -> 5.00, ours 10 -> 12 x/s (+20 %)",
        f"b, gone: only in {old}",
    ]


def test_without_files_the_two_newest_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py"])
    write(tmp_path, "2026-11-30T110000.json", "last", same=(4.0, 10.0))
    with pytest.raises(SystemExit):
        compare.main()
    assert "and here are 1: name two files" in capsys.readouterr().err
    write(tmp_path, "2026-11-30T100000.json", "before", same=(2.0, 10.0))
    write(tmp_path, "2026-11-29T230000.json", "long ago", same=(1.0, 10.0))
    compare.main()
    assert "b, same: ratio 2.00 -> 4.00, ours 10 -> 10 x/s (+0 %)" in capsys.readouterr().out


MACHINE = {"threads": 1, "cores": 1, "cpu": "c", "torch": "2", "load": 0.0}
ROWLESS = {"benchmark": "b", "machine": MACHINE, "rows": [{"case": "c"}]}
OTHERS = [
    [{"benchmark": "b", "rows": []}],
    {"began": "monday", "reports": []},
    3,
    {"reports": [3]},
    {"reports": {"a": 1}},
]
OTHERS += [{"began": "monday", "commit": "a", "reports": [ROWLESS]}]


@pytest.mark.parametrize("content", [*map(json.dumps, OTHERS), '{"began": ', "\udcff"])
def test_a_file_of_another_kind_or_a_damaged_one_is_named(tmp_path, monkeypatch, content):
    new = write(tmp_path, "new.json", "tuesday", same=(5.0, 12.0))
    (tmp_path / "bench.json").write_text(content, errors="surrogateescape")
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "bench.json"), new])
    with pytest.raises(SystemExit, match=r"bench\.json: no results of `make bench` as it is now"):
        compare.main()


def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "none.json"), str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match=r"none\.json: not readable \(No such file or directory\)"):
        compare.main()
