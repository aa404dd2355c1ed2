"""What is done to the pairs of an archive, and which of them are to do: two files that every process reads.

`archive.json` says what the table holds, so that no later call mixes another model or other options into it;
`.work/todo.arrow` holds the pairs that a call has to do, a record batch per block, read without loading it.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kcfi.archives.blocks import IMAGES, SCENES, TABLE, block_name, blocks, finished, take_out_errors, texts
from kcfi.files import read_json, write_whole
from kcfi.processing import InputError

RECORD = "archive.json"
WORK = ".work"
BLOCKS_TO_DO = "todo.arrow"
REFUSED = "refused"
FREE = ("device", "batch_size", "compiled")  # settings of a describer that a later call may change


@dataclass(frozen=True)
class Job:
    """What is done to every pair.

    Args:
        describer: arguments of `kcfi.models.build_describer`.
        reading: settings of `read_pair` that were given.
        regions: also write a sentence for every changed region.
        heatmap: also draw the strength of the key change features.
        pictures: write mask and overlay beside the table.
        scene: settings of `describe_scene`, which then writes a report per pair; None = pairs are plain images.
    """

    describer: dict[str, Any]
    reading: dict[str, Any] = field(default_factory=dict)
    regions: bool = False
    heatmap: bool = False
    pictures: bool = True
    scene: dict[str, Any] | None = None

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table."""
        return IMAGES if self.scene is None else SCENES

    def content(self, weights: str) -> dict[str, Any]:
        """What decides what a row says, plain JSON; `weights` names those of the model."""
        content = {**asdict(self), "weights": weights}
        unsaid = {*FREE, "revision"}  # which `weights` is
        content["describer"] = {name: value for name, value in self.describer.items() if name not in unsaid}
        if content["describer"].get("speed") != "bf16":  # the others write the same rows
            content["describer"].pop("speed", None)
        content["reading"] = {name: value for name, value in self.reading.items() if name != "max_image_pixels"}
        return json.loads(json.dumps(content))


class Todo:
    """The blocks of pairs that a call has to do.

    Args:
        output: folder of the archive, where `prepare` was.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.map = pa.memory_map(str(output / WORK / BLOCKS_TO_DO))
        self.file = pa.ipc.open_file(self.map)

    def close(self) -> None:
        """Let go of the file; the blocks are then out of reach."""
        del self.file
        self.map.close()

    def __len__(self) -> int:
        return int(self.file.num_record_batches)

    @property
    def pairs(self) -> int:
        """How many pairs all blocks have."""
        return sum(self.file.get_batch(number).num_rows for number in range(len(self)))

    def rows(self, number: int) -> list[dict[str, Any]]:
        """The pairs of a block: `name`, `before`, `after`, and `position` in the list."""
        rows: list[dict[str, Any]] = self.file.get_batch(number).to_pylist()
        return rows

    def path(self, number: int) -> Path:
        """The file of a block when it is done."""
        return self.output / block_name(self.rows(number))


def prepare(output: Path, pairs: pa.Table, job: Job, weights: str, block: int, retry: bool = False) -> int:
    """Write down what is to do; nothing is written if the folder holds something else.

    Args:
        output: folder of the archive.
        pairs: of `find_pairs`.
        job: what is done to each.
        weights: a name for those of the model.
        block: rows of a block.
        retry: do pairs again that ended with an error.

    Returns:
        How many of the pairs are done, or failed, already.

    Raises:
        InputError: the folder holds another archive, the same names with other images, or a table of something else.
    """
    if block < 1:
        raise InputError(f"block={block} must be at least 1.")
    _check_record(output, job.content(weights))
    _check_images(output, pairs)
    (output / WORK).mkdir(parents=True, exist_ok=True)
    _write_json(output / RECORD, {"settings": job.content(weights), "job": asdict(job)})
    for part in output.glob(".rows-*"):  # of a process that was killed
        part.unlink(missing_ok=True)
    if retry:
        take_out_errors(output)
    pairs = pairs.append_column("position", pa.array(range(len(pairs)), pa.int64()))
    todo = pairs.filter(pc.invert(pc.is_in(texts(pairs, "name"), texts(finished(output), "name"))))
    part = output / WORK / f"{BLOCKS_TO_DO}.part"
    with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, todo.schema) as writer:
        for start in range(0, len(todo), block):
            writer.write_table(todo.slice(start, block).combine_chunks())
    part.replace(output / WORK / BLOCKS_TO_DO)
    shutil.rmtree(output / WORK / "tries", ignore_errors=True)
    (output / WORK / REFUSED).unlink(missing_ok=True)
    return len(pairs) - len(todo)


def refuse(output: Path, error: InputError) -> None:
    """Note why a worker refuses the job, for the process that started the engine."""
    write_whole(output / WORK / REFUSED, str(error))


def refused(output: Path) -> str | None:
    """Why a worker refused the job, if one did."""
    path = output / WORK / REFUSED
    return path.read_text(encoding="utf-8") if path.is_file() else None


def read_job(output: Path) -> Job:
    """The job of an archive that `prepare` wrote."""
    return Job(**read_json(output / RECORD)["job"])


def _write_json(path: Path, content: Any) -> None:
    part = path.with_name(f".{path.name}")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def _check_record(output: Path, content: dict[str, Any]) -> None:
    """Refuse a folder whose table was made in another way."""
    record, there = output / RECORD, blocks(output)
    if not record.exists() and (there or (output / TABLE).exists()):
        raise InputError(f"{output} holds a {TABLE} that is of no archive: choose another --output.")
    if not there:  # what was refused later than here, or stopped before its first block, holds nobody up
        return
    before, now = (_flat(one) for one in (read_json(record).get("settings", {}), content))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise InputError(
                f"{output} was written with {name}={before.get(name)}, not {now.get(name)}: choose another --output."
            )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the groups they stand in."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _check_images(output: Path, pairs: pa.Table) -> None:
    """Refuse names that the table has with other images."""
    there = finished(output)
    if not len(there):
        return
    known, keys = (
        pc.binary_join_element_wise(
            *(texts(table, name) for name in ("name", "before", "after")), pa.scalar("\n", pa.large_string())
        )
        for table in (there, pairs)
    )
    named = pc.is_in(texts(there, "name"), texts(pairs, "name"))
    other = there.filter(pc.and_(named, pc.invert(pc.is_in(known, keys))))
    if len(other):
        name = other["name"][0].as_py()
        raise InputError(f"{output} describes other images as {name!r}: choose another --output.")
