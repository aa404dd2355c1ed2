"""The dates of a scene: their names, what identifies their files, and what must be said of them."""

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from kcfi.processing import InputError
from kcfi.scenes.findings import Date, Shift
from kcfi.scenes.grid import ground_metres
from kcfi.scenes.reading import Layer
from kcfi.scenes.registration import ALIKE, FAR

ISO = "is no date in ISO 8601, as 2021-05-30"
COARSE = 1.5  # times the model's m per pixel: what is coarser lacks what the model was trained on


def check_acquired(acquired: Sequence[str], count: int) -> None:
    """Refuse what does not say when so many dates were acquired; empty = nothing is said.

    Raises:
        InputError: another number of them, or one that is not in ISO 8601.
    """
    if acquired and len(acquired) != count:
        raise InputError(f"acquired names {len(acquired)} dates for {count} images: give one each.")
    for day in acquired:
        if not is_iso(day):
            raise InputError(f"acquired: {day!r} {ISO}.")


def is_iso(day: str) -> bool:
    """Whether a date is in ISO 8601."""
    try:
        datetime.fromisoformat(day)
    except ValueError:
        return False
    return True


def describe_dates(
    paths: Sequence[str | Path], sources: Sequence[Any], layers: Sequence[Layer], acquired: Sequence[str]
) -> tuple[Date, ...]:
    """The dates by names that differ: when they were acquired, else their files' names, with folders if need be."""
    said = [source.tags(ns="IMAGERY").get("ACQUISITIONDATETIME", "")[:10] for source in sources]
    when = acquired or [day if is_iso(day) else "" for day in said]
    names = list(when)
    for parts in (1, 2, 3):
        if len(set(names)) == len(names) and all(names):
            break
        names = ["/".join(Path(public(path)).with_suffix("").parts[-parts:]) for path in paths]
    if len(set(names)) < len(names):
        names = [f"date {number}" for number in range(1, len(names) + 1)]
    found = zip(paths, names, when, layers, strict=True)
    return tuple(Date(public(path), name, day, tuple(layer.notes)) for path, name, day, layer in found)


def public(path: str | Path) -> str:
    """A path as a report may show it: of a URL without its query, which may hold a signature that lets others in."""
    return re.sub(r"(https?://[^?]*)\?.*", r"\1", str(path))


def unordered_dates(dates: Sequence[Date]) -> list[str]:
    """The warning of dates that do not follow each other in time; those of which nobody says when are passed over."""
    days = [datetime.fromisoformat(date.acquired).date() for date in dates if date.acquired]
    if days == sorted(days):
        return []
    told = ", ".join(map(str, days))
    return [f"The images are not in order of time ({told}): what appeared may be told as removed, and the reverse."]


def coarse_dates(sources: Sequence[Any], resolution: float) -> list[str]:
    """Warnings of images whose pixels are much larger than those that the model was trained on."""
    found = []
    for source in sources:
        if source.crs is None:
            continue
        x, y = source.transform @ (source.width / 2, source.height / 2)
        right, up = ground_metres(source.crs, x, y)
        size = float(np.hypot(source.transform.a * right, source.transform.d * up))
        if size > COARSE * resolution:
            found.append(
                f"{public(source.name)} has {size:.3g} m per pixel, the model was trained at {resolution:g}: it shows "
                "less than the model looks for."
            )
    return found


def far_dates(dates: Sequence[str | Path], shift: Shift) -> list[str]:
    """The warning of dates that lie further from each other than the model puts up with."""
    distance = float(np.hypot(shift.x, shift.y))
    if distance <= FAR or shift.aligned:
        return []
    remedy = (
        "--align (align=True in Python) takes a constant shift out"
        if shift.spread <= ALIKE
        else "it is not the same everywhere, so that --align would not help: orthorectify the images"
    )
    return [
        f"{public(dates[1])} lies {distance:.1f} px from {public(dates[0])} ({shift.x:+.1f} to the right, "
        f"{shift.y:+.1f} down, spread {shift.spread:.1f}), more than {FAR:g} px: edges of unchanged buildings "
        f"may be taken for changes; {remedy}."
    ]


def fingerprint(path: str | Path) -> list[Any]:
    """What tells a file from another version of it, without reading it: path, size, time of its last change."""
    if not Path(path).exists():
        return [str(path)]  # a URL, or a path of GDAL's own
    about = Path(path).stat()
    return [str(Path(path).resolve()), about.st_size, about.st_mtime_ns]
