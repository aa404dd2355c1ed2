"""How fast a training goes, and how much memory it has taken."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Throughput:
    """Pairs and captions that a run has seen on all ranks, and how fast they went since the last line of the log.

    Attributes:
        pairs, captions: of the whole run, also of what it resumed.
    """

    def __init__(self) -> None:
        self.pairs = self.captions = 0
        self._pairs = self._captions = 0  # when the clock started
        self._started: float | None = None

    def start(self) -> None:
        """The clock runs from here, unless it does."""
        if self._started is None:
            self._started, self._pairs, self._captions = time.perf_counter(), self.pairs, self.captions

    def stop(self) -> None:
        """The clock stands until `start`."""
        self._started = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        began = time.perf_counter()
        yield
        if self._started is not None:
            self._started += time.perf_counter() - began

    def count(self, pairs: int, captions: int) -> None:
        """Add an optimizer step."""
        self.pairs += pairs
        self.captions += captions

    def logs(self) -> dict[str, float]:
        """Counts, and pairs and captions per second since the last call."""
        found: dict[str, float] = {"pairs": self.pairs, "captions": self.captions}
        if self._started is not None:
            seconds = time.perf_counter() - self._started
            found["pairs_per_second"] = (self.pairs - self._pairs) / seconds
            found["captions_per_second"] = (self.captions - self._captions) / seconds
        self.stop()
        self.start()
        return found


def peak_memory(device: torch.device) -> float | None:
    """Most memory that this process has held so far, in MiB: of the GPU, else main memory (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return None
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
