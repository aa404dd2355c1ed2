"""Pairs to describe, and what a table holds."""

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kcfi.archives.blocks import blocks

SIZES = [(32, 32), (20, 28), (32, 32), (70, 45), (32, 32), (9, 30), (32, 32)]  # the fourth is cut into tiles
ROOT = Path(__file__).parents[3]


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


@pytest.fixture
def large(tmp_path, make_pair):
    """large/A and large/B: pairs of so many tiles that a process can be killed while it describes one."""

    def build(count):
        for folder in ("A", "B"):
            (tmp_path / "large" / folder).mkdir(parents=True)
        for number in range(count):
            before, after = make_pair(220, 220, square=(20 * number, 2, 20 * number + 60, 180))
            before.save(tmp_path / "large/A" / f"{number}.png")
            after.save(tmp_path / "large/B" / f"{number}.png")
        return tmp_path / "large"

    return build


@pytest.fixture
def command(detector):
    """Start `kcfi caption` of a folder with A and B in a process of its own: arguments and environment of Popen."""

    def build(folder, output, *options):
        images = [str(folder / "A"), str(folder / "B"), "--output", str(output), "--model", str(detector)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "-m", "kcfi_cli", "caption", *images, *map(str, options)]
        return {"args": arguments, "cwd": ROOT, "env": environment}

    return build


@pytest.fixture
def start(command):
    """The same, started and not waited for; it ends with the test.

    It hears Ctrl-C, as below a terminal: where the tests are a background job of a shell, children inherit that
    SIGINT is ignored.
    """
    started = []
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)

    def build(*arguments):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        started.append(subprocess.Popen(**command(*arguments), **quiet, preexec_fn=hear))
        return started[-1]

    yield build
    for process in started:
        process.kill()
        process.wait()


def table(output):
    """All rows of an archive, by name."""
    rows = [row for path in blocks(output) for row in pq.ParquetFile(path).read().to_pylist()]
    return sorted(rows, key=lambda row: row["name"])


def digest(output):
    """A name for all that the rows of an archive say."""
    return hashlib.sha256(json.dumps(table(output)).encode()).hexdigest()
