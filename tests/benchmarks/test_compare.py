import json
import sys

import compare


def test_what_moved_is_printed_by_case(tmp_path, monkeypatch, capsys):
    def write(name, **cases):
        rows = [{"case": case, "ratio": ratio, "ours": ours, "unit": "x/s"} for case, (ratio, ours) in cases.items()]
        (tmp_path / name).write_text(json.dumps([{"benchmark": "b", "rows": rows}]))
        return str(tmp_path / name)

    old, new = write("old.json", same=(4.0, 10.0), gone=(1.0, 1.0)), write("new.json", same=(5.0, 12.0))
    monkeypatch.setattr(sys, "argv", ["compare.py", old, new])
    compare.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["b, same: ratio 4.00 -> 5.00, ours 10 -> 12 x/s (+20 %)", f"b, gone: only in {old}"]
