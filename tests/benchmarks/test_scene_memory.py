import json
import sys

import numpy as np
import pytest
import rasterio
import scene_memory


def test_the_pair_has_places_that_change_and_nothing_else(tmp_path):
    before, after = scene_memory.write_pair(tmp_path, 2400)
    with rasterio.open(before) as first, rasterio.open(after) as second:
        assert first.shape == (2400, 2400) and first.res == (0.5, 0.5)
        rows, columns = np.nonzero((first.read() != second.read()).any(0))
    assert {(y // 256, x // 256) for y, x in zip(rows[::99], columns[::99], strict=True)} == {
        (0, 0),
        (0, 8),
        (8, 0),
        (8, 8),
    }


@pytest.mark.slow
def test_memory_and_time_are_those_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scene_memory.py", "--stand_in", "--sides", "400", "--dates", "3", "--json"])
    scene_memory.main()
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["command"] == "scene" and row["px_per_s"] == pytest.approx(400**2 / row["seconds"])
    assert 100 < row["peak_mib"] < 4000


def test_a_process_that_fails_is_noticed():
    with pytest.raises(RuntimeError, match="no such thing"):
        scene_memory.measure([sys.executable, "-c", "raise SystemExit('no such thing')"])
