"""The engine `local`: this process does all blocks."""

from collections.abc import Iterator
from pathlib import Path

from kcfi.archives.work import Worker


def run(output: Path) -> Iterator[int]:
    """Do the blocks of an archive.

    Args:
        output: folder, where `prepare` was.

    Yields:
        The number of each block once it is written.
    """
    worker = Worker(output)
    for number in range(len(worker.todo)):
        worker(number)
        yield number
