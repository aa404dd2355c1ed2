"""The table of an archive: a parquet file per finished block of rows, written by rename; together they are the table.

A file is complete or not there, and no row is in two of them. `captions.csv` is the same for spreadsheets.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kcfi.processing import InputError

TABLE = "captions.csv"
PATTERN = "rows-*.parquet"
DIGITS = 6  # behind the point, of every number in a row

TEXT, NUMBER, COUNT = pa.string(), pa.float64(), pa.int64()
BOX = pa.list_(COUNT)  # left, top, right, bottom in pixels
REGION = pa.struct({"box": BOX, "pixels": COUNT, "caption": TEXT, "score": NUMBER, "probability": NUMBER})
PAIR = {"name": TEXT, "before": TEXT, "after": TEXT, "caption": TEXT}
IMAGES = pa.schema(  # a row of a pair of images
    PAIR
    | {"caption_box": BOX, "score": NUMBER, "changed_fraction": NUMBER, "changed_probability": NUMBER}
    | {"mask": TEXT, "overlay": TEXT, "heatmap": TEXT, "regions": pa.list_(REGION), "model": TEXT, "error": TEXT}
)
SCENES = pa.schema(  # a row of a scene: changes, their m2, the share of the scene that both dates cover
    PAIR | {"changes": COUNT, "area_m2": NUMBER, "coverage": NUMBER, "report": TEXT, "model": TEXT, "error": TEXT}
)


def block_name(rows: Sequence[dict[str, Any]]) -> str:
    """The file of a block of pairs: the place of its first row in the list, and a digest of all of them."""
    text = json.dumps([[row[name] for name in ("name", "before", "after")] for row in rows])
    return f"rows-{rows[0]['position']:09}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.parquet"


def write_block(path: Path, rows: pa.Table) -> None:
    """Write a block: under another name, to the disk, and then in place."""
    part = path.with_name(f".{path.name}.{uuid4().hex}")  # two processes may write the same block
    with part.open("wb") as file:
        pq.write_table(rows, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def rounded(value: Any) -> Any:
    """A value of a row with the floats in it at `DIGITS`."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def blocks(output: Path) -> list[Path]:
    """The finished blocks, in the order of their first rows."""
    return sorted(output.glob(PATTERN))


def finished(output: Path) -> pa.Table:
    """Name, before, after and error of every row that is there.

    Raises:
        InputError: two rows are of one name.
    """
    columns = ["name", "before", "after", "error"]
    empty = pa.schema([(name, TEXT) for name in columns]).empty_table()
    rows = pa.concat_tables([empty, *(_read(path, columns) for path in blocks(output))])
    twice = len(rows) - pc.count_distinct(rows["name"]).as_py()
    if twice:
        raise InputError(f"{output} has {twice} rows twice, as two calls at a time write them: take another --output.")
    return rows


def texts(rows: pa.Table, name: str) -> pa.ChunkedArray:
    """A column of texts to look others up in: with offsets of 64 bits, as those of 32 end at 2 GiB."""
    return rows[name].cast(pa.large_string())


def take_out_errors(output: Path) -> None:
    """Take the rows with an error out of their blocks, so that they are missing."""
    for path in blocks(output):
        rows = _read(path)
        kept = rows.filter(pc.is_null(rows["error"]))
        if not len(kept):
            path.unlink()
        elif len(kept) < len(rows):
            write_block(path, kept)


def _read(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    with pq.ParquetFile(path) as file:  # `read_table` takes folders called "a=b" for columns
        return file.read(columns)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a block."""
    rows: list[dict[str, Any]] = _read(path).to_pylist()
    return rows


def write_csv(output: Path, schema: pa.Schema) -> None:
    """Write `captions.csv` from the blocks; lists in it are JSON."""
    part = output / f".{TABLE}"
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, schema.names)
        writer.writeheader()
        for row in _all_rows(output):
            writer.writerow(
                {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
            )
    part.replace(output / TABLE)


def _all_rows(output: Path) -> Iterator[dict[str, Any]]:
    for path in blocks(output):
        yield from read_rows(path)
