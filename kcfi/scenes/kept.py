"""What a run has finished is kept on disk, so that one that was killed goes on where it stopped."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECORD = "record.json"


class Kept:
    """Numbered results in a folder, each written whole or not at all.

    Args:
        folder: where they lie. What other settings left there is deleted.
        record: everything that the results depend on, as JSON takes it.

    Attributes:
        anew: whether results of other settings lay there.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder, wanted = folder, json.dumps(record, indent=1, sort_keys=True)
        there = folder / RECORD
        self.anew = folder.exists() and not (there.is_file() and there.read_text(encoding="utf-8") == wanted)
        if self.anew:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not there.exists():
            write_whole(there, wanted.encode())

    def count(self) -> int:
        """How many results are there, from number 0 on without a gap."""
        number = 0
        while self._path(number).exists():
            number += 1
        return number

    def get(self, number: int) -> dict[str, NDArray[Any]]:
        """A result."""
        with np.load(self._path(number)) as arrays:
            return dict(arrays)

    def put(self, number: int, arrays: dict[str, NDArray[Any]]) -> None:
        """Keep a result."""
        unfinished = self.folder / "unfinished.npz"
        np.savez_compressed(unfinished, **arrays)  # type: ignore[arg-type]
        os.replace(unfinished, self._path(number))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.npz"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there either whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
