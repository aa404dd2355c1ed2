"""Where pairs come from: two folders, a CSV or parquet manifest, or a STAC collection -> one table of pairs."""

import csv
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kcfi.archives.fetch import check_protocol, is_remote
from kcfi.processing import InputError, refusing

PAIRS = pa.schema([(name, pa.string()) for name in ("name", "before", "after")])
IMAGES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".jp2"}
AT_ONCE = 10_000  # rows that are Python objects at a time

Row = tuple[str, str, str]  # of `PAIRS`


def find_pairs(before: str | Path, after: str | Path | None = None) -> pa.Table:
    """The pairs of two folders, or of a manifest.

    Args:
        before: folder of the earlier images, or the manifest: a CSV or parquet file with the columns `before` and
            `after` (paths, relative to its own folder, or URLs) and maybe `name`; or the JSON file of a STAC
            collection, whose items have the assets `before` and `after`.
        after: folder of the later images, whose files have the names of their partners; None with a manifest.

    Returns:
        A table of `PAIRS`, by name in folders and as they stand in a manifest; paths are absolute. A name is the file
        name of the after image without its extension, where the manifest gives none; of a STAC item it is the id.

    Raises:
        FileNotFoundError: no such file or folder.
        InputError: images without a partner, no pairs, missing columns, a name that is none of a file, two pairs of
            one name, URLs of a kind that nothing installed reads, or a manifest that cannot be read.
    """
    before = Path(before)
    rows = _manifest_pairs(before) if after is None else _folder_pairs(before, Path(after))
    chunks = iter(lambda: list(islice(rows, AT_ONCE)), [])
    pairs = pa.concat_tables(
        [PAIRS.empty_table(), *(pa.table(list(zip(*chunk, strict=True)), schema=PAIRS) for chunk in chunks)]
    )
    if not len(pairs):
        raise InputError(f"{before}: no pairs in it.")
    if pc.count_distinct(pairs["name"]).as_py() < len(pairs):
        name = pc.mode(pc.dictionary_encode(pairs["name"]).combine_chunks().indices)[0]["mode"].as_py()
        name = pairs["name"].unique()[name].as_py()
        raise InputError(f"{before}: two pairs are called {name!r}; name them in a manifest (column `name`).")
    return pairs


def _manifest_pairs(manifest: Path) -> Iterator[Row]:
    """The rows of a manifest, checked one by one."""
    protocols: set[str] = set()
    for where, row in _manifest_rows(manifest):
        before, after = row["before"], row["after"]
        name = row.get("name") or Path(urlsplit(after).path if is_remote(after or "") else after or "").stem
        if not (before and after):
            raise InputError(f"{manifest}, {where}: needs before and after.")
        _check_name(name, f"{manifest}, {where}")
        for source in filter(is_remote, (before, after)):
            check_protocol(source, protocols)
        yield name, _absolute(before, manifest), _absolute(after, manifest)


def _check_name(name: str, where: str) -> None:
    """Refuse a name that as one of a file may lie elsewhere than in the output, or on what an archive keeps there."""
    if not name or name.startswith(".") or set(name) & set("/\\\0"):
        raise InputError(
            f"{where}: {name!r} cannot name a pair: give a name that has no slash and does not begin with a dot."
        )


def _manifest_rows(manifest: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, and its columns; a manifest may hold anything."""
    kind, read = {
        ".csv": ("CSV in UTF-8", _csv_rows),
        ".parquet": ("parquet", _parquet_rows),
        ".json": ("a STAC collection", _stac_rows),
    }[manifest.suffix.lower()]
    with refusing(f"{manifest}: not readable as {kind}"):
        yield from read(manifest)


def _absolute(source: str, manifest: Path) -> str:
    return source if is_remote(source) else os.path.abspath(manifest.parent / source)


def _csv_rows(manifest: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with manifest.open(newline="", encoding="utf-8-sig") as file:  # as Excel writes it
        reader = csv.DictReader(file)
        _check_columns(manifest, reader.fieldnames or [])
        for number, row in enumerate(reader, start=2):
            yield f"line {number}", row


def _parquet_rows(manifest: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with pq.ParquetFile(manifest) as file:
        _check_columns(manifest, file.schema_arrow.names)
        columns = [name for name in PAIRS.names if name in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(AT_ONCE, columns=columns):
            for row in pa.table(batch).cast(pa.schema([PAIRS.field(name) for name in batch.schema.names])).to_pylist():
                number += 1
                yield f"row {number}", row


def _check_columns(manifest: Path, columns: Any) -> None:
    if not {"before", "after"} <= set(columns):
        raise InputError(f"{manifest}: needs the columns before and after; it has {', '.join(columns) or 'none'}.")


def _stac_rows(manifest: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pystac
    except ImportError as error:
        raise InputError(f'{manifest}: to read STAC collections, pip install "kcfi[geo]"') from error
    catalog = pystac.read_file(str(manifest.absolute()))
    if not isinstance(catalog, pystac.Catalog):  # a collection is one too
        raise InputError(f"{manifest}: not readable as a STAC collection (it is of type {type(catalog).__name__}).")
    for item in catalog.get_items(recursive=True):
        missing = [date for date in ("before", "after") if date not in item.assets]
        if missing:
            raise InputError(
                f"{manifest}, item {item.id}: has no asset {missing[0]!r}; a pair is an item with the assets before "
                f"and after. It has {', '.join(item.assets) or 'none'}."
            )
        hrefs = {date: item.assets[date].get_absolute_href() for date in ("before", "after")}
        yield f"item {item.id}", {"name": str(item.id), **hrefs}


def _folder_pairs(before: Path, after: Path) -> Iterator[Row]:
    first, second = (
        {path.name: path for path in folder.iterdir() if path.suffix.lower() in IMAGES} for folder in (before, after)
    )
    alone = [str(path) for name, path in sorted({**first, **second}.items()) if not (name in first and name in second)]
    if alone:
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        raise InputError(f"Images without a partner of the same name: {', '.join(alone[:3])}{more}.")
    for name, path in sorted(first.items()):
        _check_name(path.stem, str(path))
        yield path.stem, os.path.abspath(path), os.path.abspath(second[name])
