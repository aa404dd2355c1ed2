"""A data set as one archive, zip or tar, as LEVIR-CC and LEVIR-MCI are distributed."""

import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from transformers.utils import logging

from kcfi.processing import InputError, refusing
from kcfi.training.data.levir_cc import CAPTIONS_FILES

logger = logging.get_logger(__name__)

DEPTH = 2  # folders that may lie around that of the captions file


@contextmanager
def unpacked(archive: Path, beside: Path) -> Iterator[Path]:
    """The folder of a LEVIR-CC or LEVIR-MCI archive, unpacked for as long as the context lasts.

    Args:
        archive: Zip or tar (`.tar.gz` and the like). Its content is written below a new folder and nowhere else: paths
            and links that lead out are refused.
        beside: Folder to unpack in, whose disk must have room for what the archive says it holds.

    Raises:
        FileNotFoundError: There is no captions file in the first `DEPTH` levels of folders.
        InputError: It is no archive, is damaged, would not fit on the disk, leads out, or holds two data sets.
    """
    with TemporaryDirectory(prefix=".unpacked-", dir=beside) as temporary:
        folder = Path(temporary)
        with refusing(f"{archive}: cannot be unpacked"):
            if zipfile.is_zipfile(archive):
                _unpack_zip(archive, folder)
            elif tarfile.is_tarfile(archive):
                _unpack_tar(archive, folder)
            else:
                raise InputError(f"{archive}: neither a folder nor a zip or tar archive")
        levels = ["*/" * depth for depth in range(DEPTH + 1)]
        found = sorted(
            {path.parent for level in levels for name in CAPTIONS_FILES for path in folder.glob(level + name)}
        )
        if not found:
            raise FileNotFoundError(
                f"{archive}: no {' or '.join(CAPTIONS_FILES)} in its first {DEPTH} levels of folders"
            )
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in found)
            raise InputError(
                f"{archive}: holds several data sets ({names}). Unpack it and convert one of the folders."
            )
        yield found[0]


def _unpack_zip(archive: Path, folder: Path) -> None:
    """Unpack a zip; links in it become files."""
    with zipfile.ZipFile(archive) as content:
        for entry in content.infolist():
            path = PurePosixPath(entry.filename)
            if path.is_absolute() or ".." in path.parts:
                raise InputError(f"{archive}: {entry.filename} leads out of the folder to unpack in")
        sizes = [entry.file_size for entry in content.infolist()]  # a file that turns out larger is cut and refused
        _check_room(archive, sizes, folder)
        content.extractall(folder)


def _unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as content:
        _check_room(archive, [entry.size for entry in content], folder)
        content.extractall(folder, filter="data")  # refuses absolute paths, "..", links that lead out, devices
        while content.fileobj.read(2**20):  # type: ignore[union-attr]  # to the checksum at the end
            pass


def _check_room(archive: Path, sizes: list[int], folder: Path) -> None:
    needed, free = sum(sizes), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{archive}: unpacked it needs {needed / 2**30:.1f} GiB, but {folder.parent} has {free / 2**30:.1f} GiB "
            "left: choose an --output on another disk"
        )
    logger.warning(f"{archive}: unpacking {len(sizes)} entries, {needed / 2**30:.1f} GiB")
