"""Runs of the model that end in time, and as soon as nobody waits for them."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kcfi.demo.limits import Limits, Refused

OPENED = 10  # seconds after which whoever asked must be listening for the answer


class Left(Exception):
    """Nobody waits for the answer any more."""


class Runs:
    """Watches what is computed: before each tile and each word the time, and whether anybody listens.

    Args:
        model: KCFIForConditionalGeneration; one run at a time may use it.
        limits: of the page.
    """

    def __init__(self, model: Any, limits: Limits) -> None:
        self.parts = (model.model.vision_tower, model.model.language_model)
        self.limits = limits
        self.listening: Counter[str] = Counter()  # open streams of answers by session

    @contextmanager
    def listen(self, session: str) -> Iterator[None]:
        """As long as this is open, somebody waits for the answers of a session."""
        self.listening[session] += 1
        try:
            yield
        finally:
            self.listening[session] -= 1
            self.listening += Counter()  # forgets those of which none is open

    @contextmanager
    def run(self, session: str | None) -> Iterator[None]:
        """Ends what is computed in this block when its time is over, or its session gone (None: never).

        Raises:
            Refused: 504.
            Left: the session has closed its stream, or not opened one within `OPENED` seconds.
        """
        start, seen = time.monotonic(), False

        def check(*_: Any) -> None:
            nonlocal seen
            spent = time.monotonic() - start
            if spent > self.limits.seconds:
                raise Refused(
                    504,
                    f"This took longer than the {self.limits.seconds:g} s that a run may take here: give smaller "
                    "images, or use `kcfi caption` or `kcfi scene` on a machine of your own.",
                )
            if session is not None:
                seen = seen or session in self.listening
                if session not in self.listening and (seen or spent > OPENED):
                    raise Left

        hooks = [part.register_forward_pre_hook(check) for part in self.parts]
        try:
            yield
            check()
        finally:
            for hook in hooks:
                hook.remove()
