"""Many pairs at once: how they are found, what the table holds, and that nothing is lost."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from kcfi.models import load
from kcfi.pair_list import COLUMNS, describe_list, find_pairs
from kcfi.processing import Describer, describer_kcfi
from kcfi_cli import main

SIZES = [(32, 32), (20, 28), (32, 32), (70, 45), (32, 32), (9, 30), (32, 32)]  # the fourth is cut into tiles


@pytest.fixture(scope="module")
def describer(detector):
    return Describer(*load(str(detector)), batch_size=3)


@pytest.fixture
def folders(tmp_path, make_pair):
    """A/ and B/ with a pair of each size; a square changes, elsewhere in each."""
    for folder in ("A", "B"):
        (tmp_path / folder).mkdir()
    for number, size in enumerate(SIZES):
        before, after = make_pair(*size, square=(number, 2, number + 8, 18))
        before.save(tmp_path / "A" / f"pair_{number}.png")
        after.save(tmp_path / "B" / f"pair_{number}.png")
    return tmp_path


def table(output):
    with (output / "captions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Finding


def test_folders_are_paired_by_file_name_and_other_files_are_left_alone(folders):
    (folders / "A" / "notes.txt").write_text("mine")
    pairs = find_pairs(folders / "A", folders / "B")
    assert [pair.name for pair in pairs] == [f"pair_{number}" for number in range(len(SIZES))]
    assert all(pair.before.parent.name == "A" and pair.after.parent.name == "B" for pair in pairs)


def test_images_without_a_partner_are_named(folders):
    (folders / "B" / "pair_2.png").unlink()
    for number in range(4):
        Image.new("RGB", (8, 8)).save(folders / "B" / f"new_{number}.png")
    with pytest.raises(ValueError, match=r"without a partner .*new_0\.png, .*new_1\.png, .*new_2\.png and 2 more\."):
        find_pairs(folders / "A", folders / "B")
    (folders / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no pairs in it"):
        find_pairs(folders / "empty", folders / "empty")
    for folder in ("C", "D"):
        (folders / folder).mkdir()
        for suffix in ("png", "jpg"):
            Image.new("RGB", (8, 8)).save(folders / folder / f"one.{suffix}")
    with pytest.raises(ValueError, match=r"two pairs are called 'one'; name them in a manifest"):
        find_pairs(folders / "C", folders / "D")


def test_a_manifest_of_excel_names_pairs_anywhere(folders):
    rows = "name,before,after\nfirst,A/pair_0.png,B/pair_1.png\n,A/pair_2.png,B/pair_3.png\n"
    (folders / "pairs.csv").write_text(rows, encoding="utf-8-sig")
    first, second = find_pairs(folders / "pairs.csv")
    assert (first.name, first.before, first.after) == ("first", folders / "A/pair_0.png", folders / "B/pair_1.png")
    assert second.name == "pair_3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "needs the columns before and after; it has a, b"),
        ("", "it has none"),
        ("before,after\n", "no pairs in it"),
        ("before,after\na.png,\n", "line 2: needs before and after"),
        ("before,after,name\na.png,b.png,x/y\n", "line 2: .*a name without a slash"),
        ("before,after\na/1.png,b/1.png\nc/1.png,d/1.png\n", "two pairs are called '1'"),
    ],
)
def test_a_bad_manifest_is_refused(tmp_path, text, message):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_pairs(tmp_path / "pairs.csv")


# Describing


def test_a_list_gets_what_single_pairs_get(describer, folders):
    pairs = find_pairs(folders / "A", folders / "B")
    rows = list(describe_list(describer, pairs, folders / "out", "tiny", regions=True, heatmap=True))
    assert [row["name"] for row in rows] == [pair.name for pair in pairs]
    for pair, row in zip(pairs, rows, strict=True):
        alone = describer.describe(pair.before, pair.after, regions=True)
        assert row["caption"] == alone.caption and row["error"] is None
        assert row["changed_fraction"] == pytest.approx(alone.changed_fraction, abs=0.01) and alone.changed_fraction
        assert (np.asarray(Image.open(row["mask"])) > 0).mean() == pytest.approx(row["changed_fraction"])
        assert [region["caption"] for region in row["regions"]] == [region.caption for region in alone.regions]
        assert Image.open(row["heatmap"]).size == Image.open(row["overlay"]).size == Image.open(pair.after).size
    written = table(folders / "out")
    assert list(written[0]) == COLUMNS and [row["caption"] for row in written] == [row["caption"] for row in rows]
    assert json.loads(written[3]["regions"]) == [
        {**region, "box": list(region["box"])} for region in rows[3]["regions"]
    ]
    assert json.loads(written[3]["caption_box"]) == list(rows[3]["caption_box"]) != [0, 0, 70, 45]
    assert json.loads(written[0]["caption_box"]) == [0, 0, 32, 32]


def test_a_second_call_adds_what_it_asks_for_and_refuses_other_images_of_the_same_names(describer, folders):
    pairs, output = find_pairs(folders / "A", folders / "B")[:3], folders / "out"
    list(describe_list(describer, pairs, output, "tiny"))
    assert [row["regions"] for row in table(output)] == [""] * 3
    rows = list(describe_list(describer, pairs, output, "tiny", regions=True, heatmap=True))
    assert len(rows) == 3 and all(row["regions"] and row["heatmap"] for row in table(output))
    assert list(describe_list(describer, pairs, output, "tiny", regions=True)) == []
    before = (output / "captions.csv").read_bytes()
    with pytest.raises(ValueError, match="describes other images as 'pair_0': choose another --output"):
        next(describe_list(describer, find_pairs(folders / "B", folders / "A")[:3], output, "tiny"))
    assert (output / "captions.csv").read_bytes() == before


def test_a_sentence_of_two_lines_is_one_row_and_a_cut_within_a_character_is_survived(describer, folders, monkeypatch):
    def write(features):
        return ["ein Haus\n fällt weg"] * len(features.pooler_output), [0.5] * len(features.pooler_output)

    monkeypatch.setattr(describer, "_write", write)
    pairs, output = find_pairs(folders / "A", folders / "B")[:3], folders / "out"
    assert [row["caption"] for row in describe_list(describer, pairs, output, "tiny")] == ["ein Haus fällt weg"] * 3
    data = (output / "captions.csv").read_bytes()
    (output / "captions.csv").write_bytes(data[: data.rindex("ä".encode()) + 1])  # in the middle of the letter
    assert [row["name"] for row in describe_list(describer, pairs, output, "tiny")] == ["pair_2"]
    assert (output / "captions.csv").read_bytes() == data


def test_regions_without_a_head_are_refused_before_anything_is_written(make_detector, folders, tmp_path):
    model = make_detector(tmp_path / "model", use_change_detection_head=False)
    pairs = find_pairs(folders / "A", folders / "B")
    with pytest.raises(ValueError, match="no change detection head"):
        next(describe_list(Describer(*load(str(model))), pairs, folders / "out", "tiny", regions=True))
    assert not (folders / "out").exists()


@pytest.mark.parametrize(
    ("at_once", "expected"),  # three pairs; the large one: six tiles and, again, the one that changed most
    [(8, [3, 3, 3, 1, 3]), (2, [2, 1, 2, 1, 2, 1, 1, 2, 1])],
)
def test_small_pairs_are_encoded_together_and_once(describer, folders, monkeypatch, at_once, expected):
    monkeypatch.setattr(describer_kcfi, "ENCODED_BY_CPU", at_once)
    encoded = []
    encode = describer.model.model.get_stage_features

    def count(pixel_values):
        encoded.append(len(pixel_values))
        return encode(pixel_values)

    monkeypatch.setattr(describer.model.model, "get_stage_features", count)
    list(describe_list(describer, find_pairs(folders / "A", folders / "B"), folders / "out", "tiny"))
    assert encoded == expected


def test_a_broken_pair_is_a_row_and_a_second_call_does_what_is_missing(folders, detector, capsys):
    images = ["caption", str(folders / "A"), str(folders / "B"), "--model", str(detector)]
    arguments = [*images, "--output", str(folders / "out")]
    whole = (folders / "B" / "pair_1.png").read_bytes()
    (folders / "B" / "pair_1.png").write_bytes(whole[:60])
    assert main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(SIZES) + 1 and lines[-1].startswith(f"{len(SIZES) - 1} of {len(SIZES)} pairs: ")
    rows = table(folders / "out")
    assert "pair_1.png" in rows[1]["error"] and not rows[1]["caption"] and lines[1] == f"pair_1: {rows[1]['error']}"
    assert all(row["caption"] and not row["error"] for number, row in enumerate(rows) if number != 1)

    (folders / "B" / "pair_1.png").write_bytes(whole)
    text = (folders / "out" / "captions.csv").read_text()
    (folders / "out" / "captions.csv").write_text(text[: text.rindex("\n", 0, -1) + 9])  # killed in the last row
    assert main([*arguments, "--json"]) == 0
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == ["pair_1", "pair_6"]
    assert sorted(row["name"] for row in table(folders / "out")) == [f"pair_{number}" for number in range(len(SIZES))]
    assert main(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_table_of_another_model_is_not_mixed_with_this_one(describer, folders):
    pairs = find_pairs(folders / "A", folders / "B")[:2]
    list(describe_list(describer, pairs, folders / "out", "one"))
    with pytest.raises(ValueError, match="was written by the model one: choose another --output"):
        next(describe_list(describer, pairs, folders / "out", "two"))
    (folders / "out" / "captions.csv").write_text("filename,words\na,b\n")
    with pytest.raises(ValueError, match="is not a table of kcfi caption"):
        next(describe_list(describer, pairs, folders / "out", "one"))


def test_a_bug_is_no_pair_that_cannot_be_read(tmp_path, detector, make_pair, monkeypatch):
    def fails(*_, **reading):
        raise ValueError("operands could not be broadcast together")

    for name, image in zip(("before.png", "after.png"), make_pair(40, 30), strict=True):
        image.save(tmp_path / name)
    (tmp_path / "list.csv").write_text("before,after\nbefore.png,after.png\n")
    monkeypatch.setattr("kcfi.pair_list.read_pair", fails)
    pairs = find_pairs(tmp_path / "list.csv")
    with pytest.raises(ValueError, match="broadcast"):
        list(describe_list(Describer(*load(str(detector))), pairs, tmp_path / "out", "detector"))
