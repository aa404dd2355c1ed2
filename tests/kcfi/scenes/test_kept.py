import numpy as np
import pytest

from kcfi.scenes.kept import Kept, write_whole


def test_results_are_there_for_the_next_run_with_the_same_record(tmp_path):
    first = Kept(tmp_path / "kept", {"model": "a"})
    assert first.count() == 0 and not first.anew
    for number in range(3):
        first.put(number, {"mask": np.full((2, 3), number, np.uint8), "sentences": np.array(["a house", ""])})
    again = Kept(tmp_path / "kept", {"model": "a"})
    assert again.count() == 3 and not again.anew
    assert (again.get(2)["mask"] == 2).all() and again.get(0)["sentences"].tolist() == ["a house", ""]


def test_another_record_starts_anew(tmp_path):
    Kept(tmp_path / "kept", {"model": "a"}).put(0, {"mask": np.zeros(3)})
    other = Kept(tmp_path / "kept", {"model": "b"})
    assert other.anew and other.count() == 0 and not Kept(tmp_path / "kept", {"model": "b"}).anew


def test_what_comes_behind_a_gap_does_not_count(tmp_path):
    kept = Kept(tmp_path, {})
    kept.put(0, {})
    kept.put(2, {})
    assert kept.count() == 1


def test_a_result_that_was_not_finished_is_not_there(tmp_path, monkeypatch):
    kept = Kept(tmp_path / "kept", {})

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        kept.put(0, {"mask": np.zeros(3)})
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.json", b"{}")
    assert kept.count() == 0 and not (tmp_path / "a.json").exists()
