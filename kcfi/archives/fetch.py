"""Files by URL, as fsspec knows them (https://, s3://, ...) -> local copies, which everything else reads."""

from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from kcfi.processing import InputError

CHUNK = 1 << 20  # bytes


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
        limit: bytes; refuse larger files, by their header where it says how large they are.

    Returns:
        The path itself, or that of a copy with the name of the file.

    Raises:
        InputError: it cannot be fetched, or is too large; names the URL.
    """
    if not is_remote(source):
        return Path(source)
    folder.mkdir(parents=True, exist_ok=True)
    path = _copy(source, folder)
    try:
        with fsspec.open(source, "rb") as file, path.open("wb") as copy:
            _check_size(source, getattr(file, "size", None) or 0, limit)  # not every server says it
            while chunk := file.read(CHUNK):
                copy.write(chunk)
                _check_size(source, copy.tell(), limit)
    except InputError:
        raise
    except Exception as error:  # every kind of file system raises its own
        raise InputError(f"{source}: cannot be fetched ({type(error).__name__}: {error})") from error
    return path


def reason(error: Exception, copies: dict[Path, str]) -> str:
    """The message of an error in one line; it names URLs where it named their copies.

    Args:
        error: of whoever read the files.
        copies: sources by the folders that `fetch` was given for them.
    """
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
            f"{source}: more than {limit} bytes, so more than max_image_pixels at 8 bytes each. If it is meant, raise "
            "`--max_image_pixels`."
        )
