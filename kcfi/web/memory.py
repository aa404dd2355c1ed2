"""The memory of a process that answers for weeks: glibc's allocator, told to give back what is free."""

import ctypes
import sys
from typing import Any

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of mallopt, <malloc.h>
LARGE = 1 << 20  # bytes from which a block is one of the system's own, which goes back to it when it is freed
ARENAS = 2  # heaps from which threads are given smaller blocks; of its own glibc makes up to eight for each core


def keep_arenas_small() -> None:
    """Bound what is kept of freed memory, on Linux with glibc; before threads are started.

    Left alone, glibc makes a heap for each of many threads, and the first large block that is freed raises the size up
    to which blocks come out of a heap, where one small block above keeps all below.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_ARENA_MAX, ARENAS)


def give_back() -> None:
    """Give free pages inside of heaps back to the system, on Linux with glibc, which of its own gives their ends."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


def _of_glibc(name: str) -> Any:
    """A function of the C library; None on other systems, and where the library has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
