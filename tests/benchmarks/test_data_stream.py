import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data_stream.py"


def test_it_prints_two_rates_as_one_json_object():
    command = [sys.executable, str(SCRIPT), "--pairs", "2", "--json"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    rates = json.loads(process.stdout)["pairs_per_second_per_process"]
    assert rates.keys() == {"painted", "truth_only"} and min(rates.values()) > 0
