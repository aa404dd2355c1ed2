"""Small changes to valid files, for `tests/fuzz.py` and for Hypothesis: bytes and a source of chance -> other bytes.

A format that guards itself by checksums or lengths has a mutator of its own, which mends them: otherwise nothing but
the guard would ever be tried.
"""

import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet

Mutator = Callable[[bytes, Random], bytes]

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
DEEP = 2_000  # brackets: more than Python takes, and no more work than need be
# What may stand in a file of settings where nobody expects it.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 2**31, 2**63, -(2**64), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", "\0", "a\0b.png", "..", "../../etc/passwd", "/etc/passwd", "/dev/zero", "http://127.0.0.1:9/x.png",
    "a" * 300, "A" * 70_000, "\ud800", "‮é中", "{{", "%s%n", "1e999", "null", "true", "-1", [], {}, [[]], [None],
    {"": None}, {"a": {"b": [1, "x"]}}, ["x"] * 50, [0] * 1000,
)  # fmt: skip


def flip(content: bytes, chance: Random) -> bytes:
    """Some bits turn over."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def overwrite(content: bytes, chance: Random) -> bytes:
    """A number of 1 to 8 bytes is put somewhere, often near the front, where headers are."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        size, order = chance.choice((1, 2, 4, 8)), chance.choice(("little", "big"))
        number = chance.choice(NUMBERS) % (1 << 8 * size)
        reach = chance.choice((min(len(changed), 256), len(changed)))
        start = chance.randrange(reach + 1)
        changed[start : start + size] = number.to_bytes(size, order)
    return bytes(changed)


def cut(content: bytes, chance: Random) -> bytes:
    """The file ends early, or bytes in the middle are missing."""
    start = chance.randrange(len(content) + 1)
    end = chance.choice((len(content), chance.randint(start, len(content))))
    return content[:start] + content[end:]


def double(content: bytes, chance: Random) -> bytes:
    """Bytes of the file, or zeros, are put in once more, somewhere."""
    start, place = chance.randrange(len(content) + 1), chance.randrange(len(content) + 1)
    more = content[start : start + chance.randint(1, 512)]
    return content[:place] + chance.choice((more, bytes(len(more)))) + content[place:]


RAW: tuple[Mutator, ...] = (flip, overwrite, cut, double)


def raw(content: bytes, chance: Random) -> bytes:
    """One to three of `RAW`."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        content = chance.choice(RAW)(content, chance)
    return content


def change_value(value: Any, chance: Random) -> Any:
    """One entry of what JSON or YAML holds is replaced, left out, doubled, renamed, or wrapped up."""
    spots = list(_spots(value))
    if not spots:
        return chance.choice(VALUES)
    parent, key = chance.choice(spots)
    action = chance.choice(("replace", "replace", "replace", "other", "leave out", "rename", "wrap"))
    if action == "replace":
        parent[key] = chance.choice(VALUES)
    elif action == "other":
        place, name = chance.choice(spots)
        parent[key] = json.loads(json.dumps(place[name]))
    elif action == "leave out":
        del parent[key]
    elif action == "rename" and isinstance(parent, dict):
        parent[chance.choice(("", "x", "type", "auto_map", key.upper()))] = parent.pop(key)
    else:
        parent[key] = chance.choice(([parent[key]], {"x": parent[key]}))
    return value


def _spots(value: Any) -> Any:
    """Every (container, key) of a nested value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _spots(value[key])


def json_text(content: bytes, chance: Random) -> bytes:
    """A JSON file: one or two entries change, or the text does, or it is nested deeper than anybody means."""
    kind = chance.randrange(20)
    if kind == 0:
        return b'{"a":' * DEEP + b"1" + b"}" * DEEP if chance.randrange(2) else b"[" * 100 * DEEP
    if kind < 6:
        return raw(content, chance)
    value = json.loads(content)
    for _ in range(chance.choice((1, 1, 2))):
        value = change_value(value, chance)
    return json.dumps(value).encode()


def gzipped_json(content: bytes, chance: Random) -> bytes:
    """The same within a gzip, whose checksum fits; or the gzip itself changes."""
    if chance.randrange(3) == 0:
        return raw(content, chance)
    return gzip.compress(json_text(gzip.decompress(content), chance))


ANCHORS = b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b"*a%d, " % (n - 1) * 9) for n in range(1, 9))
YAML_LINES = (
    ANCHORS, b"x: !!python/object/apply:os.system ['true']\n", b"dwa: 2026-01-01\n", b"seed: 1_0\n",
    b"? [a, b]\n: 1\n", b"base: recipe.yaml\n", b"1: 2\n", b"seed: .inf\n", b"dataset: &a [*a]\n",
    b"model: !!binary aGk=\n", b"<<: {a: 1}\n",
)  # fmt: skip


def yaml_text(content: bytes, chance: Random) -> bytes:
    """A YAML file of `field: JSON value` lines: a value or the text changes, or a line of another kind is put in."""
    kind = chance.randrange(8)
    if kind == 0:
        return b"a: " + b"[" * DEEP
    if kind < 3:
        return raw(content, chance)
    lines = content.splitlines(keepends=True)
    place = chance.randrange(len(lines))
    if kind < 5:
        lines.insert(place, chance.choice(YAML_LINES))
    else:
        name = lines[place].partition(b":")[0]
        lines[place] = name + b": " + json.dumps(chance.choice(VALUES)).encode() + b"\n"
    return b"".join(lines)


def png(content: bytes, chance: Random) -> bytes:
    """A chunk of a PNG changes and its checksum fits."""
    if chance.randrange(4) == 0 or len(content) < 33:
        return raw(content, chance)
    chunks, place = [], 8
    while place + 12 <= len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
        place += size + 12
    number = chance.randrange(len(chunks))
    kind, data = chunks[number]
    action = chance.randrange(4)
    if action == 0:
        chunks.insert(chance.randrange(len(chunks)), (kind, data))
    elif action == 1:
        other = (b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"acTL", b"fdAT", b"eXIf", b"gAMA", kind)
        chunks[number] = chance.choice(other), raw(data, chance)
    elif kind == b"IDAT" and action == 2:
        chunks[number] = kind, zlib.compress(raw(zlib.decompress(data), chance))
    else:
        chunks[number] = kind, raw(data, chance)
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return content[:8] + body


def tiff(content: bytes, chance: Random) -> bytes:
    """A field of the first directory of a little-endian TIFF changes: its tag, type, count or value."""
    start = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[start : start + 2], "little")
    if chance.randrange(3) == 0 or not count or content[:4] != b"II*\0":
        return raw(content, chance)
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2))):
        entry = start + 2 + 12 * chance.randrange(count)
        offset, size = chance.choice(((0, 2), (2, 2), (4, 4), (8, 4), (8, 2), (8, 4)))
        number = chance.choice((*NUMBERS, chance.randrange(len(content)), chance.randrange(1, 20)))
        changed[entry + offset : entry + offset + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(changed)


def parquet(content: bytes, chance: Random) -> bytes:
    """A parquet file changes as bytes, or a cell or a column of its table does."""
    if chance.randrange(3) == 0:
        return raw(content, chance)
    table = pyarrow.parquet.read_table(io.BytesIO(content))
    rows = table.to_pylist()
    row = chance.choice(rows)
    key = chance.choice(list(row))
    if isinstance(row[key], dict) and chance.randrange(2):
        row[key]["bytes"] = png(row[key]["bytes"], chance)
    elif chance.randrange(2):
        row[key] = chance.choice((None, "", "\0", "..", "/dev/zero", []))
    else:
        wanted = chance.choice((None, 1, "x", [], {"bytes": None, "path": "../x.png"}, {"path": "/dev/zero"}))
        rows = [{**one, key: wanted} for one in rows]
    buffer = io.BytesIO()
    try:
        try:
            changed = pyarrow.Table.from_pylist(rows, table.schema)
        except (pyarrow.ArrowException, TypeError):  # the column gets another type
            changed = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(changed, buffer)
    except (pyarrow.ArrowException, UnicodeEncodeError):  # a column of two types
        return raw(content, chance)
    return buffer.getvalue()


def safetensors(content: bytes, chance: Random) -> bytes:
    """The header of a safetensors file changes, with or without its length."""
    size = int.from_bytes(content[:8], "little")
    kind = chance.randrange(3)
    if kind == 0:
        return raw(content[: 8 + size], chance) + content[8 + size :]
    header = json_text(content[8 : 8 + size], chance) if kind == 1 else raw(content[8 : 8 + size], chance)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]
