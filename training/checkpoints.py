"""Checkpoints are complete or invisible, whenever their run is stopped: by a kill, a full disk, a power failure.

A checkpoint is written into the hidden folder `.unfinished` of its run and gets its marker, `complete.json`: the step,
and the size of every file. All is flushed to the disk; then the folder is renamed to `checkpoint-N`. Who looks for
checkpoints reads the markers in folders of such names. One that is no longer needed goes the same way back: renamed,
then deleted. What a stop leaves in `.unfinished` is deleted by whoever saves next.

A finished run has a marker too, in its own folder, about its weights.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kcfi.files import write_whole

MARKER = "complete.json"
UNFINISHED = ".unfinished"


def begin(run: Path) -> Path:
    """The empty folder of a run to write a checkpoint into."""
    discard(run)
    (run / UNFINISHED).mkdir(parents=True)
    return run / UNFINISHED


def discard(run: Path) -> None:
    """Delete what was not finished, or is no longer needed."""
    if (run / UNFINISHED).exists():
        shutil.rmtree(run / UNFINISHED)


def publish(run: Path, checkpoint: Path, step: int) -> None:
    """Make what was written since `begin`, and flushed, the checkpoint of a step; an incomplete one gives way."""
    mark(run / UNFINISHED, step, (file for file in (run / UNFINISHED).rglob("*") if file.is_file()))
    if checkpoint.exists():
        shutil.rmtree(checkpoint)
    (run / UNFINISHED).rename(checkpoint)
    _flush(run)


def flush(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Return when files in a folder are on the disk; None: all of them, and folders, at any depth.

    Links and pipes, which no training writes, are left alone.
    """
    for path in folder.rglob("*") if files is None else files:
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            _flush(path)
    _flush(folder)


def written_since(file: Path) -> list[Path]:
    """The files beside a file that were last written with it or after it."""
    begin = file.stat().st_mtime_ns
    others = [path for path in file.parent.iterdir() if path.is_file() and not path.is_symlink()]
    return [path for path in others if path.stat().st_mtime_ns >= begin]


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and its file system keeps their order
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def mark(folder: Path, step: int, files: Iterable[Path]) -> None:
    """Say of a folder that it is complete: its files are there, of the sizes that they have now."""
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    write_whole(folder / MARKER, json.dumps({"step": step, "files": sizes}))
    _flush(folder)


def step_of(folder: Path) -> int | None:
    """The optimizer step of a complete folder; None if it has no marker, or a file is missing or of another size."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if all((folder / name).stat().st_size == size for name, size in marker["files"].items()):
            return int(marker["step"])
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        pass  # also any other JSON of that name
    return None


def is_complete(folder: Path) -> bool:
    """Whether a folder is a complete checkpoint, or a finished run."""
    return step_of(folder) is not None


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, by their steps from the oldest to the newest."""
    folders = [marker.parent for marker in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{MARKER}")]
    found = [(step, folder) for folder in folders if (step := step_of(folder)) is not None]
    return [folder for _, folder in sorted(found)]


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints, but for the best and the newest one.

    Args:
        run: folder of the run.
        limit: how many complete ones remain (None or 0: all).
        best: path of the best one, as the trainer's state has it.
    """
    found = complete_checkpoints(run)
    old = [folder for folder in found[:-1] if best is None or folder.name != Path(best).name]
    for folder in old[: max(0, len(found) - limit)] if limit else []:
        folder.rename(run / UNFINISHED)
        discard(run)


@contextmanager
def writing(run: Path, step: int) -> Iterator[None]:
    """Inside, the checkpoint of a step, or the model that a run ends with, is written.

    Raises:
        OSError: that failed, for example because the disk is full; names folder, step, free space and what there is to
            resume from. What was written of a checkpoint is deleted.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and "inline_container" not in str(error):  # so torch.save fails to write
            raise
        shutil.rmtree(run / UNFINISHED, ignore_errors=True)
        complete = complete_checkpoints(run)
        advice = f"go on from {complete[-1].name} with --resume" if complete else "start again"
        raise OSError(
            f"Step {step} could not be saved in {run}, where {free_mib(run)} MiB are free ({error}). Make room, or "
            f"make the folder writable, and {advice}."
        ) from error


def check_writable(run: Path) -> None:
    """Try to write into the folder of a run, or where it will be made, before data and model are loaded.

    Raises:
        OSError: it cannot be written to.
    """
    there = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b" ")
    except OSError as error:
        raise OSError(
            f"output_dir {run} cannot be written to ({error.strerror}): choose another --output_dir, or make it "
            "writable."
        ) from error


def check_space(run: Path, checkpoint: int, limit: int | None, weights: int) -> None:
    """Refuse to begin what would not fit on the disk.

    Args:
        run: folder of the run, which may have checkpoints.
        checkpoint: bytes of one; 0 if none will be written.
        limit: checkpoints that remain, as in `rotate`; while one more is written, all of them are there.
        weights: bytes of the model that the run ends with.

    Raises:
        OSError: with both numbers.
    """
    more = max(1, (limit or 0) + 1 - len(complete_checkpoints(run))) if checkpoint else 0
    needed = more * checkpoint + weights
    if needed > shutil.disk_usage(run).free:
        raise OSError(
            f"output_dir {run} has {free_mib(run)} MiB free, and this run needs at least {needed // 2**20}: {more} "
            f"more checkpoint(s) of {checkpoint // 2**20} MiB and the model that it ends with. Make room, choose "
            "another --output_dir, or keep fewer checkpoints (--save_total_limit 1)."
        )


def free_mib(folder: Path) -> int:
    """Free space of the disk that a folder lies on, in MiB."""
    return shutil.disk_usage(folder).free // 2**20
