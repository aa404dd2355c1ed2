"""`describe_archive`: a list of pairs -> its table, by one of three engines, and how much of it is done."""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from kcfi.archives import local
from kcfi.archives.blocks import finished, read_rows, texts, write_csv
from kcfi.archives.calls import only_call, wait_for_workers
from kcfi.archives.job import WORK, Job, Todo, prepare, refused
from kcfi.archives.work import check_job
from kcfi.models import model_source, weights_of
from kcfi.processing import InputError

COVERAGE = "coverage.json"

Engine = Literal["local", "accelerate", "ray"]


@dataclass(frozen=True)
class Coverage:
    """How much of a list is done.

    Args:
        pairs: in the list.
        done: described, by this call or an earlier one.
        failed: with an error, likewise.
        reasons: of them, how often each; the names of the files and all numbers are left out.
        skipped: done or failed before this call.
        seconds: of this call, with the start of the engine.
        rows_per_second: done or failed in this call.
    """

    pairs: int
    done: int
    failed: int
    reasons: dict[str, int]
    skipped: int
    seconds: float
    rows_per_second: float


def describe_archive(
    pairs: pa.Table,
    output: Path,
    job: Job,
    engine: Engine = "local",
    *,
    block: int = 16,
    workers: int | None = None,
    address: str | None = None,
    retry: bool = False,
) -> Generator[list[dict[str, Any]], None, None]:
    """Describe pairs into parquet files in a folder, a file per block; at the end, captions.csv and coverage.json.

    What an earlier call did is not done again.

    Args:
        pairs: of `find_pairs`.
        output: folder.
        job: what is done to each pair.
        engine: who does it: this process, processes of this machine (accelerate), or Ray.
        block: rows that are written at once, and done again after a stop.
        workers: processes or actors; None = one per GPU, or one.
        address: of a Ray cluster.
        retry: do pairs again that ended with an error.

    Yields:
        The rows of each block once it is written, in any order.

    Raises:
        InputError: the folder holds something else, another call or its workers write into it, the model cannot do
            what the job asks for, or an engine is not installed.
        ChildProcessError: a process of accelerate died.
    """
    _check_workers(workers, engine, job.describer.get("device"))
    start = time.monotonic()
    weights = weights_of(job.describer["model"])
    if not Path(model_source(job.describer["model"])).is_dir():  # every process loads the commit that the Hub has now
        job = replace(job, describer={**job.describer, "revision": weights})
    check_job(job)
    output = output.absolute()
    with only_call(output) as call:
        skipped = prepare(output, pairs, job, weights, block, retry)
        todo = Todo(output)
        try:
            if len(todo):
                for number in _run(engine, output, call, workers, address):
                    yield read_rows(todo.path(number))
        finally:
            todo.close()
            wait_for_workers(output)  # what those of an engine that is stopped have written is in the table, too
            write_csv(output, job.schema)
            covered = _coverage(output, pairs, skipped, time.monotonic() - start)
            (output / COVERAGE).write_text(json.dumps(asdict(covered), indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(output / WORK, ignore_errors=True)  # it holds nothing that is needed again


def _check_workers(workers: int | None, engine: Engine, device: str | None) -> None:
    """Refuse numbers of workers that cannot be."""
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers} must be at least 1.")
    if engine != "local" and workers != 1 and ":" in (device or ""):
        raise InputError(f"device={device} is one device: give workers=1, or a device without a number.")


def _run(engine: Engine, output: Path, call: str, workers: int | None, address: str | None) -> Iterator[int]:
    """The numbers of blocks that an engine finishes; what a worker refuses is raised here for all of them."""
    try:
        yield from _start(engine, output, call, workers, address)
    except Exception:
        if message := refused(output):
            raise InputError(message) from None
        raise


def _start(engine: Engine, output: Path, call: str, workers: int | None, address: str | None) -> Iterator[int]:
    """The numbers of blocks that an engine finishes."""
    if engine == "local":
        return local.run(output)
    if engine == "accelerate":
        from kcfi.archives import processes

        return processes.run(output, call, workers)
    from kcfi.archives import ray_engine  # needs the extra `ray`

    return ray_engine.run(output, call, workers, address)


def _coverage(output: Path, pairs: pa.Table, skipped: int, seconds: float) -> Coverage:
    """What the table has of the pairs of a list."""
    rows = finished(output)
    rows = rows.filter(pc.is_in(texts(rows, "name"), texts(pairs, "name")))
    errors = rows.filter(pc.is_valid(rows["error"]))
    reasons: Counter[str] = Counter()
    for batch in errors.to_batches():
        reasons.update(map(_reason, batch.to_pylist()))
    return Coverage(
        pairs=len(pairs),
        done=len(rows) - len(errors),
        failed=len(errors),
        reasons=dict(reasons.most_common()),
        skipped=skipped,
        seconds=round(seconds, 3),
        rows_per_second=round((len(rows) - skipped) / seconds, 3),
    )


def _reason(row: dict[str, Any]) -> str:
    """An error without what is of its row alone."""
    text = row["error"]
    for date in ("before", "after"):
        text = text.replace(row[date], date.upper())
    return re.sub(r"\d+", "#", text)
