"""The licences of everything that an installation of kcfi brings along, into `docs/licences.md`: `make licences`.

It reads what is installed: kcfi, what it requires, what that requires, and so on; of extras only what is there.
"""

import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PAGE = Path(__file__).parents[1] / "docs" / "licences.md"
HEAD = """# Licences of the dependencies

What an environment with all extras holds, by what each package says of itself; `make licences` writes this page anew.
"extra": only some extras need it. kcfi itself is Apache-2.0.

"""
LONGEST = 150  # characters of a cell; some packages put the whole text of their licence there


def licence_of(metadata: Any) -> str:
    """What a package says of its licence: the expression, else the classifiers, else the first line of the field."""
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier", []) if "License ::" in line]
    names = [name for name in classifiers if name != "OSI Approved"]
    field = (metadata.get("License") or "").strip().splitlines()
    said = metadata.get("License-Expression") or ", ".join(names) or (field[0] if field else "")
    return said[:LONGEST] or "not stated"


def required(name: str, extras: Iterable[str] = ()) -> list[Requirement]:
    """What a package that is installed requires here, with some of its extras."""
    found = [Requirement(line) for line in distribution(name).requires or []]
    environments = [{"extra": extra} for extra in ("", *extras)]
    return [one for one in found if one.marker is None or any(one.marker.evaluate(where) for where in environments)]


def closure(name: str, extras: Iterable[str] = ()) -> set[str]:
    """The names, in small letters, of all that a package brings along, as far as it is installed."""
    names: set[str] = set()
    waiting = required(name, extras)
    while waiting:
        one = waiting.pop()
        key = re.sub(r"[-_.]+", "-", one.name).lower()
        if key in names:
            continue
        try:
            more = required(key, one.extras)
        except PackageNotFoundError:
            continue
        names.add(key)
        waiting += more
    return names


def table() -> str:
    """The rows of the page."""
    extras = distribution("kcfi").metadata.get_all("Provides-Extra", [])
    core, everything = closure("kcfi"), closure("kcfi", extras)
    lines = ["| package | version | licence | |", "|---|---|---|---|"]
    for name in sorted(everything):
        found = distribution(name)
        licence = licence_of(found.metadata).replace("|", "/")
        lines.append(f"| {name} | {found.version} | {licence} | {'' if name in core else 'extra'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(HEAD + table(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
