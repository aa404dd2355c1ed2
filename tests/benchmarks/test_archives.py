import json
import sys

import archives
import pyarrow.parquet as pq
import pytest
from PIL import Image


def test_the_list_has_crops_that_differ_and_rows_of_them(tmp_path):
    manifest = archives.write_manifest(tmp_path, 50, 64)
    rows = pq.read_table(manifest).to_pylist()
    assert len(rows) == len({row["name"] for row in rows}) == 50 and rows[0]["before"] == rows[40]["before"]
    crops = {Image.open(tmp_path / row["after"]).tobytes() for row in rows}
    assert len(crops) == archives.CROPS and Image.open(tmp_path / rows[0]["before"]).size == (64, 64)


def test_the_costs_of_list_and_table_are_per_row(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["archives.py", "--driver", "--rows", "2500"])
    archives.main()
    costs = json.loads(capsys.readouterr().out)
    assert len(costs) == 7 and all(cost > 0 for name, cost in costs.items() if name != "bytes of memory")


@pytest.mark.slow
def test_engines_are_measured_and_compared(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["archives.py", "--rows", "8", "--block", "2", "--cases", "0", "2", "--json"])
    with pytest.raises(SystemExit) as ended:
        archives.main()
    local, processes = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert ended.value.code == 0 and local["digest"] == processes["digest"] and local["failed"] == 0
    assert min(local["rows_per_s"], local["cpu_ms_per_row"]) > 0 and 100 < local["peak_mib"] < processes["peak_mib"]
