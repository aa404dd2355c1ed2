import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data_stream.py"


def test_it_prints_a_row_for_drawn_pairs_and_one_for_shards():
    command = [sys.executable, str(SCRIPT), "--repeats", "1", "--batch", "2", "--json"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(process.stdout.splitlines()[-1])["rows"]
    assert [row["case"] for row in rows] == ["drawn on the fly", "parquet shards"]
    assert all(row["ours"] > 0 and row["plain"] > 0 for row in rows)
