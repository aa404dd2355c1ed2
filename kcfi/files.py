"""JSON and YAML files, names in messages, new folders, and files that are there as a whole."""

import difflib
import gzip
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml

from kcfi.processing import InputError, refusing

MOST_VALUES = 100_000  # of a YAML text
LARGEST = 2**26  # bytes that may come out of a .gz; LEVIR-CC's captions have 8 MB


def read_json(path: Path) -> Any:
    """Read a JSON file, plain or gzipped (`.gz`), refusing keys that occur twice in one object.

    Args:
        path: The file, in UTF-8.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no JSON, an object repeats a key, a text is no Unicode (half of a pair of surrogates), or
            more than `LARGEST` bytes come out of a `.gz`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with refusing(f"{path}: not readable as JSON"):
        content = _unpacked(path) if path.suffix == ".gz" else path.read_bytes()
        value = json.loads(content, object_pairs_hook=_unique_keys)
        if b"\\ud" in content or b"\\uD" in content:  # escapes of halves, which no file can be written with
            json.dumps(value, ensure_ascii=False).encode()
        return value


def _unpacked(path: Path) -> bytes:
    """The content of a gzip file, as far as it is no larger than anybody means."""
    with gzip.open(path) as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise InputError(f"{path}: more than {LARGEST >> 20} MiB come out of it; if that is meant, unpack it first.")
    return content


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; plain `dict` would keep the last of two equal keys and say nothing."""
    counts = Counter(key for key, _ in items)
    if len(counts) < len(items):
        raise ValueError(f"{name_some(key for key in counts if counts[key] > 1)} occurs more than once")
    return dict(items)


def read_yaml(path: Path, optional: Collection[str] | None = ()) -> dict[str, Any]:
    """The `field: value` lines of a file.

    Args:
        path: the file.
        optional: fields that may be `null` (None: all).

    Raises:
        InputError: it is not YAML, holds something else, or another field has no value.
    """
    with refusing(f"{path} is not a YAML file"):
        values = _load_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold `field: value` lines, but holds a {type(values).__name__}.")
    for name in values:
        if not isinstance(name, str):
            raise InputError(f"{path}: {name!r} is no name of a field; quote it if it is meant as one.")
    empty = [name for name, value in values.items() if value is None and optional is not None and name not in optional]
    if empty:
        raise InputError(f"{path}: {', '.join(map(str, empty))} has no value; leave the line out to keep the default.")
    return values


def _load_yaml(text: str) -> Any:
    """The value of a YAML text; references (`*name`) to references may stand for more than memory holds."""
    value = yaml.safe_load(text)
    waiting, count = [value], 0
    while waiting:
        one = waiting.pop()
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        count += 1
        if count > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
    return value


def as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """The dictionary of a field that may come as JSON or YAML text, or not at all.

    Raises:
        InputError: the text is not a dictionary.
    """
    parsed = parse_yaml(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict | None):
        raise InputError(f"{value!r} is not a dictionary: write it as JSON, for example '{{\"num_labels\": 2}}'.")
    return dict(parsed or {})


def parse_yaml(text: str) -> Any:
    """The value of a text in JSON or YAML.

    Raises:
        InputError: it is neither.
    """
    with refusing(f"{text!r} is neither JSON nor YAML"):
        return _load_yaml(text)


def check_names(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse a name that is not known, and propose the nearest one.

    Raises:
        InputError: the first unknown name.
    """
    known = list(known)
    for name in map(str, names):
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" did you mean {nearest[0]!r}?" if nearest else f" known: {', '.join(sorted(known))}."
            raise InputError(f"Unknown {what} {name!r}:{hint}")


def name_some(names: Iterable[str], limit: int = 5) -> str:
    """Join names for an error message, at most `limit` of them and the count of the rest."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + rest


def check_new_folder(folder: Path) -> None:
    """Refuse to write a data set over anything.

    Raises:
        FileExistsError: If the path is a file or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose a new one")


def move_into_place(folder: Path, output: Path) -> None:
    """Give a folder that is complete its name: `output`, new or empty (onto which Windows renames nothing)."""
    if output.exists():
        output.rmdir()
    folder.rename(output)


def write_whole(file: Path, text: str) -> None:
    """Write a text file that is there as a whole or as it was before, wherever the process or the machine stops."""
    part = file.with_name(f".{file.name}.part")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)
