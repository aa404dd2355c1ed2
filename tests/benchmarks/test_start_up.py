import json
import subprocess
import sys

import pytest
import start_up


def test_help_is_timed_against_a_python_that_does_something(monkeypatch, capsys):
    monkeypatch.setitem(start_up.SIDES, "plain", ["-c", "import time; time.sleep(0.5)"])
    monkeypatch.setattr(sys, "argv", ["start_up.py", "--repeats", "1", "--json"])
    start_up.main()
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert 0 < row["plain"] < 2 and row["ours"] > 0 and row["ratio"] == pytest.approx(row["ours"] / row["plain"])


def test_a_command_that_fails_is_noticed(monkeypatch):
    monkeypatch.setitem(start_up.SIDES, "ours", ["-c", "raise SystemExit(3)"])
    monkeypatch.setitem(start_up.SIDES, "plain", ["-c", "pass"])
    monkeypatch.setattr(sys, "argv", ["start_up.py", "--repeats", "1"])
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        start_up.main()
