"""The memory of a process that answers for weeks: glibc's allocator, told to give back what is free."""

import ctypes
import sys

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of mallopt, <malloc.h>
LARGE = 1 << 20  # bytes from which a block is one of the system's own, which goes back to it when it is freed
ARENAS = 2  # heaps from which threads are given smaller blocks; of its own glibc makes up to eight for each core


def keep_arenas_small() -> None:
    """Bound what is kept of freed memory, on Linux with glibc; before threads are started.

    Left alone, glibc makes a heap for each of many threads, and the first large block that is freed raises the size up
    to which blocks come out of a heap, where one small block above keeps all below.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none, or one that does nothing
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_ARENA_MAX, ARENAS)
