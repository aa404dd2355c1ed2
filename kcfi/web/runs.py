"""Runs of a model that end in time, and as soon as nobody waits for them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kcfi.web.limits import Refused


class Left(Exception):
    """Nobody waits for the answer any more."""


def parts_of(model: Any) -> tuple[Any, Any]:
    """What a KCFIForConditionalGeneration calls for each tile, and for each word."""
    return model.model.vision_tower, model.model.language_model


@contextmanager
def watched(parts: Sequence[Any], check: Callable[[float], None]) -> Iterator[None]:
    """Calls `check` with the seconds that have passed before each tile and each word; what it raises ends the run.

    Args:
        parts: of a model that one run at a time uses.
        check: raises what the run is to end with.
    """
    start = time.monotonic()

    def look(*_: Any) -> None:
        check(time.monotonic() - start)

    hooks = [part.register_forward_pre_hook(look) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_time(spent: float, seconds: float) -> None:
    """Refuse what has taken longer than it may.

    Raises:
        Refused: 504.
    """
    if spent > seconds:
        raise Refused(
            504,
            f"This took longer than the {seconds:g} s that a run may take here: give smaller images, or use "
            "`kcfi caption` or `kcfi scene` on a machine of your own.",
        )
