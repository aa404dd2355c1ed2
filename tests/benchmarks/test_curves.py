import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "curves.py"


def draw(tmp_path, *runs, names):
    command = [sys.executable, str(SCRIPT), *map(str, runs), "--names", *names, "--output", str(tmp_path / "out.png")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_panel_per_quantity_and_a_quantity_that_is_missing_is_named(tmp_path):
    for run, loss in (("a", 1.0), ("b", 3.0)):
        (tmp_path / run).mkdir()
        history = [{"step": step, "caption_loss": loss / step} for step in (1, 2, 3)]
        (tmp_path / run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    runs = [tmp_path / "a", tmp_path / "b"]
    pictures = []
    for chosen in (runs[:1], runs):
        assert draw(tmp_path, *chosen, names=["caption_loss"]).returncode == 0
        with Image.open(tmp_path / "out.png") as picture:
            assert picture.size == (400, 300)
            pictures.append(np.asarray(picture))
    assert (pictures[0] != pictures[1]).any()
    assert "a logged no mask_loss" in draw(tmp_path, runs[0], names=["caption_loss", "mask_loss"]).stderr
