import json
import sys

import caption_folder
import pytest

from kcfi.models import load
from kcfi.processing import describer_kcfi


@pytest.fixture
def tiny(detector, monkeypatch):
    """A model that writes short sentences of random letters."""
    model, processor = load(str(detector))
    monkeypatch.setattr(describer_kcfi, "LONGEST", 4)
    monkeypatch.setattr(caption_folder, "build_reader", lambda case: (model, processor))
    monkeypatch.setattr(caption_folder, "matmul_peak", lambda: 1e12)
    options = ["--cases", "kcfi-tiny", "--pairs", "1", "--repeats", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["caption_folder.py", *options])
    return model, processor


def test_both_sides_write_the_same_sentences_and_pictures(tiny, tmp_path):
    caption_folder.write_pairs(tmp_path, 2)
    sides = caption_folder.make_sides(tmp_path, *tiny)
    plain, ours = sides["plain"](), sides["ours"]()
    assert plain == ours and list(ours) == ["000", "001"] and all(len(text) > 1 for text in ours.values())
    pictures = {path.name for path in (tmp_path / "plain").iterdir()}
    assert len(pictures) == 4 and pictures <= {path.name for path in (tmp_path / "ours").iterdir()}


def test_the_row_has_speed_and_work_of_both_sides(tiny, capsys):
    caption_folder.main()
    [row] = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["case"] == "kcfi-tiny, 1 pairs" and row["plain"] > 0 and row["ours"] > 0
    assert (
        row["gflop"][0] == pytest.approx(row["gflop"][1], rel=0.01) and row["gflop"][0] > 0
    )  # one by one, or batched


def test_other_sentences_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(caption_folder, "ours", lambda folder, describer: {"000": "another sentence"})
    with pytest.raises(AssertionError, match="the sentences differ"):
        caption_folder.main()
