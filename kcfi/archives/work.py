"""A block of pairs -> a block of the table, with the pictures beside it: what every engine calls."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from kcfi.archives.blocks import rounded, write_block
from kcfi.archives.images import describe_images
from kcfi.archives.job import Job, Todo, read_job, refuse
from kcfi.models import build_describer
from kcfi.processing import Describer, InputError


def check_job(job: Job) -> None:
    """Refuse a job that no worker could do; the model is built without its weights.

    What depends on the machine of a worker, `device` and `speed`, it refuses itself.

    Raises:
        InputError: the model's settings cannot be loaded, or it cannot do what the job asks for.
    """
    _build(job, device="meta", speed="plain")


def _build(job: Job, **changed: Any) -> Describer:
    """The describer of a job, with changed settings; a model without a head is refused now, and not in every row."""
    describer = build_describer(**(job.describer | changed))
    if job.regions or job.scene is not None:
        describer.check_regions()
    return describer


class Worker:
    """Does blocks of an archive, one after the other.

    Args:
        output: folder of the archive, where `prepare` was.
        device: for the model, in place of that of the job.

    Raises:
        InputError: the model cannot be loaded, or cannot do what the job asks for.
    """

    def __init__(self, output: Path, device: str | None = None) -> None:
        self.output, self.job, self.todo = output, read_job(output), Todo(output)
        try:
            self.describer = _build(self.job, **({"device": device} if device else {}))
        except InputError as error:
            refuse(output, error)
            raise
        for weights in [*self.describer.model.parameters(), *self.describer.model.buffers()]:
            # sums depend on where in memory numbers lie: as in their file here, and elsewhere for another device
            weights.data = weights.data.clone()
        if self.job.scene is None:  # a scene knows its tiles
            self.describer.expect(self.todo.pairs)

    def __call__(self, number: int) -> None:
        """Describe the pairs of a block, and write it; nothing if it is there."""
        if self.todo.path(number).exists():
            return
        rows = self.todo.rows(number)
        if self.job.scene is None:
            self._write(number, describe_images(rows, self.describer, self.job, self.output))
        else:
            from kcfi.archives.scenes import describe_scenes  # needs the extra `geo`

            self._write(number, describe_scenes(rows, self.describer, self.job, self.output))

    def give_up(self, number: int, reason: str) -> None:
        """Write a block of rows with an error; nothing if it is there."""
        if not self.todo.path(number).exists():
            self._write(number, ({"error": reason} for _ in self.todo.rows(number)))

    def _write(self, number: int, results: Iterable[dict[str, Any]]) -> None:
        """Write the results of the pairs of a block, in their order, as rows of the table."""
        empty = dict.fromkeys(self.job.schema.names)
        model = self.job.describer["model"]
        rows = [
            rounded(empty | {name: row[name] for name in ("name", "before", "after")} | {"model": model} | result)
            for row, result in zip(self.todo.rows(number), results, strict=True)
        ]
        write_block(self.todo.path(number), pa.Table.from_pylist(rows, self.job.schema))
