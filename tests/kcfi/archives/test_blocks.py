"""The files of a table."""

import csv
import json
import os

import pyarrow as pa
import pytest

from kcfi.archives.blocks import (
    IMAGES,
    SCENES,
    block_name,
    finished,
    read_rows,
    rounded,
    take_out_errors,
    write_block,
    write_csv,
)
from tests.kcfi.archives.conftest import table


def rows(*names, **columns):
    empty = dict.fromkeys(IMAGES.names)
    return [{**empty, "name": name, "before": f"/A/{name}", "after": f"/B/{name}", **columns} for name in names]


def write(path, *rows):
    write_block(path, pa.Table.from_pylist(list(rows), IMAGES))


def test_a_block_is_named_by_the_place_of_its_first_row_and_by_all_of_its_rows():
    one, two = ([{**row, "position": 70 + at} for at, row in enumerate(rows(*names))] for names in ("ab", "ac"))
    assert block_name(one).startswith("rows-000000070-") and block_name(two).startswith("rows-000000070-")
    assert block_name(one) != block_name(two) and block_name(one) == block_name([dict(row) for row in one])
    moved = [{**one[0], "after": "/elsewhere"}, one[1]]
    assert block_name(moved) != block_name(one)


def test_a_block_that_could_not_be_written_whole_is_not_there(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "rows-0.parquet", *rows("a"))
    assert list(finished(tmp_path)["name"]) == [] and not (tmp_path / "rows-0.parquet").exists()


def test_rows_come_back_as_they_were_written_also_by_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    region = {"box": [1, 2, 3, 4], "pixels": 5, "caption": "a house", "score": 0.5, "probability": None}
    [row] = rows("a", caption_box=[0, 0, 9, 9], score=0.25, regions=[region])
    folder = tmp_path / "year=2024"  # no column of a table
    folder.mkdir()
    write(folder / "rows-0.parquet", row)
    assert read_rows(folder / "rows-0.parquet") == [row]
    read = datasets.load_dataset("parquet", data_files=f"{tmp_path}/*/rows-*.parquet", split="train")
    assert read[0]["regions"] == [region] and read[0]["caption_box"] == [0, 0, 9, 9] and len(read) == 1


def test_only_floats_are_rounded_at_any_depth():
    value = {"a": [0.12345678, {"b": 1 / 3, "c": 7, "d": "0.12345678"}], "e": None, "f": True}
    assert rounded(value) == {"a": [0.123457, {"b": 0.333333, "c": 7, "d": "0.12345678"}], "e": None, "f": True}


def test_errors_are_taken_out_and_nothing_else(tmp_path):
    write(tmp_path / "rows-0.parquet", *rows("a"), *rows("b", error="broken"), *rows("c"))
    write(tmp_path / "rows-1.parquet", *rows("d", "e", error="broken"))
    write(tmp_path / "rows-2.parquet", *rows("f"))
    untouched = (tmp_path / "rows-2.parquet").stat().st_mtime_ns
    take_out_errors(tmp_path)
    assert [row["name"] for row in table(tmp_path)] == ["a", "c", "f"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows-0.parquet", "rows-2.parquet"]
    assert (tmp_path / "rows-2.parquet").stat().st_mtime_ns == untouched


def test_the_csv_has_the_rows_of_all_blocks_in_their_order_with_lists_as_json(tmp_path):
    write(tmp_path / "rows-000000002-x.parquet", *rows("c", caption='ein "Haus", weg', caption_box=[0, 0, 1, 2]))
    write(tmp_path / "rows-000000000-x.parquet", *rows("b"), *rows("a", error="broken"))
    write_csv(tmp_path, IMAGES)
    with (tmp_path / "captions.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [row["name"] for row in read] == ["b", "a", "c"] and list(read[0]) == IMAGES.names
    assert read[2]["caption"] == 'ein "Haus", weg' and json.loads(read[2]["caption_box"]) == [0, 0, 1, 2]
    assert read[1]["error"] == "broken" and read[0]["error"] == ""


def test_both_kinds_of_tables_begin_with_the_pair_and_end_with_the_error():
    for schema in (IMAGES, SCENES):
        assert schema.names[:4] == ["name", "before", "after", "caption"] and schema.names[-2:] == ["model", "error"]
