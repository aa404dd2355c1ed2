import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "false_alarms.py"


def test_it_prints_the_scores_of_drawn_pairs():
    command = [sys.executable, str(SCRIPT), "--num_pairs", "4"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    scores = json.loads(process.stdout)
    assert scores["pairs"] == "drawn" and scores["f1"] > 50  # the embedded model
    assert 0 <= scores["standing"] < 20 and 0 <= scores["unchanged"] < 20 and 0 <= scores["ece"] < 20
