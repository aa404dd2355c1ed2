"""Files by URL, as fsspec knows them (https://, s3://, ...) -> local copies, which everything else reads."""

import errno
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from kcfi.processing import InputError

CHUNK = 1 << 20  # bytes
TRIES, PAUSE = 3, 1.0  # at a URL that fails, and the s before the second; twice that before the third
STALLED = 60  # s without a byte, after which a server is given up
# what is wrong with the machine, and not with a pair: every row that follows would have the same error
MACHINE = {"ENOSPC", "EDQUOT", "EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE"}


def is_remote(source: str) -> bool:
    """Whether a source is a URL, and no path of this machine."""
    return "://" in source


def check_protocol(source: str, known: set[str]) -> None:
    """Refuse a URL that nothing installed reads.

    Args:
        source: the URL.
        known: protocols that are readable, to which this one is added.

    Raises:
        InputError: names the package that is missing, or the protocol that nobody knows.
    """
    protocol = source.partition("://")[0]
    if protocol not in known:
        try:
            fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise InputError(f"{source}: cannot be read by URL: {error}") from error
        known.add(protocol)


def fetch(source: str, folder: Path, limit: int | None = None) -> Path:
    """The file of a source on this machine.

    Args:
        source: path or URL.
        folder: for the copy of a URL; it is made.
        limit: bytes; refuse larger files, by their header where it says how large they are; None = any.

    Returns:
        The path itself, or that of a copy with the name of the file, and of one time for all copies: a later copy
        counts as the same file.

    Raises:
        InputError: it cannot be fetched, or is too large; names the URL.
        OSError: this machine is at its end, see `MACHINE`.
    """
    if not is_remote(source):
        return Path(source)
    folder.mkdir(parents=True, exist_ok=True)
    path = _copy(source, folder)
    for again in reversed(range(TRIES)):
        try:
            _download(source, path, limit)
            break
        except InputError:
            raise
        except Exception as error:  # every kind of file system raises its own
            raise_of_machine(error)
            if not again or isinstance(error, FileNotFoundError | PermissionError):
                raise InputError(f"{source}: cannot be fetched ({type(error).__name__}: {error})") from error
            time.sleep(PAUSE * (TRIES - again))
    os.utime(path, (0, 0))
    return path


def _download(source: str, path: Path, limit: int | None) -> None:
    """Copy the file of a URL."""
    options: dict[str, Any] = {}
    if source.startswith(("http://", "https://")):
        import aiohttp  # which fsspec reads them with

        # in one stream: not every server gives out parts of a file
        options = {"block_size": 0, "client_kwargs": {"timeout": aiohttp.ClientTimeout(None, sock_read=STALLED)}}
    system, place = fsspec.url_to_fs(source, **options)
    _check_size(source, system.info(place).get("size") or 0, limit)  # not every server says it
    with system.open(place, "rb") as file, path.open("wb") as copy:
        while chunk := file.read(CHUNK):
            copy.write(chunk)
            _check_size(source, copy.tell(), limit)


def raise_of_machine(error: BaseException) -> None:
    """Raise an error, or what it comes from, if this machine is at its end (`MACHINE`, memory) and no file is bad."""
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if isinstance(cause, MemoryError) or errno.errorcode.get(number or 0) in MACHINE:
            raise cause
        cause = cause.__cause__


def reason(error: Exception, copies: dict[Path, str]) -> str:
    """The message of an error in one line; it names URLs where it named their copies.

    What is no fault of the files is raised, see `raise_of_machine`.

    Args:
        error: of whoever read the files.
        copies: sources by the folders that `fetch` was given for them.
    """
    raise_of_machine(error)
    text = " ".join(str(error).split())
    for folder, source in copies.items():
        if is_remote(source):
            text = text.replace(str(_copy(source, folder)), source)
    return text


def _copy(source: str, folder: Path) -> Path:
    return folder / (Path(urlsplit(source).path).name or "image")


def _check_size(source: str, size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise InputError(
            f"{source}: more than {limit} bytes, the most that is fetched of a scene, or of an image (8 bytes per "
            "pixel of `--max_image_pixels`). If it is meant, raise that, or give the path of a copy on this machine."
        )
