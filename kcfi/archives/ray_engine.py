"""The engine `ray`: Ray Data hands the blocks to a pool of actors, here or on a cluster (extra `ray`).

Each actor holds the model and writes its blocks itself; only their numbers go back. Ray starts an actor that died
again, gives its blocks out anew, and gives no actor more than it can do.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kcfi.archives.calls import join_call
from kcfi.archives.job import WORK, Todo, read_job
from kcfi.archives.work import Worker
from kcfi.processing import InputError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
try:
    import ray
    import ray.data
except ImportError as error:
    raise InputError('The engine ray needs Ray Data: pip install "kcfi[ray]"') from error

TRIES = 3  # at a block whose process dies; then its rows are errors


def run(output: Path, call: str, workers: int | None = None, address: str | None = None) -> Iterator[int]:
    """Do the blocks of an archive.

    Args:
        output: folder, where `prepare` was; all machines of a cluster see it under this path.
        call: that does it, see `only_call`.
        workers: actors; None = one per GPU, or one.
        address: of a cluster, as `ray.init` takes it; None = that of RAY_ADDRESS, else this machine.

    Yields:
        The number of each block once it is written.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)  # tracebacks of what is raised here anyway
    own = not ray.is_initialized()
    if own:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    ray.data.DataContext.get_current().execution_no_progress_timeout_s = -1  # a large scene takes its time
    try:
        count = len(Todo(output))
        numbers = ray.data.from_items([{"block": number} for number in range(count)], override_num_blocks=count)
        workers, share = _share(workers, read_job(output).describer["device"])
        pool = ray.data.ActorPoolStrategy(size=workers)
        done = numbers.map_batches(Actor, fn_constructor_args=[str(output), call], batch_size=1, compute=pool, **share)
        for row in done.iter_rows():
            yield int(row["block"])
    finally:
        if own:
            ray.shutdown()


def _share(workers: int | None, device: str | None) -> tuple[int, dict[str, Any]]:
    """How many actors there are, and what each has: a GPU where there are some, else its share of the cores."""
    there = ray.cluster_resources()
    gpus = 0 if device == "cpu" else int(there.get("GPU", 0))
    if gpus:
        return workers or gpus, {"num_gpus": 1}
    workers = workers or 1
    largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    share = min(there["CPU"] / workers, largest)
    return workers, {"num_cpus": int(share) if share >= 1 else share}


class Actor:
    """What an actor does with the numbers of blocks that Ray Data gives it."""

    def __init__(self, output: str, call: str) -> None:
        self.lock = join_call(Path(output), call)
        self.worker, self.tries = Worker(Path(output)), Path(output, WORK, "tries")
        self.tries.mkdir(exist_ok=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do the blocks; the same batch."""
        for number in batch["block"].tolist():
            with (self.tries / str(number)).open("ab") as file:
                file.write(b".")
                tries = file.tell()
            if tries > TRIES:
                self.worker.give_up(number, f"the process ended {TRIES} times while it did the block of this pair")
            else:
                self.worker(number)
        return batch
