"""Who may write into an archive: one call, and the workers that it starts, for as long as they live.

Workers of a call that was killed write on until they notice. So each holds a lock of its own, which ends with its
process, and the next call begins when all of them are free; a worker that is late sees that its call has ended.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from kcfi.archives.job import WORK
from kcfi.files import write_whole
from kcfi.processing import InputError

LOCK = "lock"  # of the call
CALL = "call"  # its name
WORKERS = "workers"  # folder of their locks
PATIENCE = 60  # s for which a call waits for workers that are to end


@contextmanager
def only_call(output: Path) -> Iterator[str]:
    """Around a call that writes into a folder: nobody else does at the same time.

    Yields:
        A name for the call, by which its workers join it.

    Raises:
        InputError: another call is at work, or a worker of an earlier one.
    """
    work = output / WORK
    (work / WORKERS).mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"{output}: another call is at work there; wait for it, or choose another --output."
        ) from error
    try:
        call = uuid4().hex
        write_whole(work / CALL, call)
        wait_for_workers(output)
        yield call
    finally:
        (work / CALL).unlink(missing_ok=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # it holds a lock, or what is to do
            (work / WORKERS).rmdir()
            work.rmdir()


def join_call(output: Path, call: str) -> FileLock:
    """The lock of a worker, which keeps it to its end and begins when it has it.

    Args:
        output: folder of the archive.
        call: that started the worker, see `only_call`.

    Raises:
        InputError: that call has ended.
    """
    work = output / WORK
    lock = FileLock(work / WORKERS / uuid4().hex, thread_local=False)
    lock.acquire()
    if not (work / CALL).is_file() or (work / CALL).read_text(encoding="utf-8") != call:
        raise InputError(f"{output}: the call that started this worker has ended.")
    return lock


def wait_for_workers(output: Path) -> None:
    """Wait until no worker that has joined a call is left.

    Raises:
        InputError: one does not end.
    """
    end = time.monotonic() + PATIENCE
    for path in (output / WORK / WORKERS).glob("*"):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=max(0.0, end - time.monotonic()))
        except Timeout as error:
            raise InputError(
                f"{output}: a worker of an earlier call is still at work there; end it, or choose another --output."
            ) from error
        path.unlink(missing_ok=True)
        lock.release()
