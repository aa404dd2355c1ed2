"""Runs of the model that end in time, and as soon as the session that asked for them is gone."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kcfi.web.limits import RequestLimits
from kcfi.web.runs import Left, check_time, parts_of, watched

OPENED = 10  # seconds after which whoever asked must be listening for the answer


class Runs:
    """Watches what is computed: before each tile and each word the time, and whether anybody listens.

    Args:
        model: KCFIForConditionalGeneration; one run at a time may use it.
        limits: of the page.
    """

    def __init__(self, model: Any, limits: RequestLimits) -> None:
        self.parts, self.limits = parts_of(model), limits
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
    def run(self, session: str | None) -> Iterator[Callable[[], None]]:
        """Ends what is computed in this block when its time is over, or its session gone (None: never).

        Yields:
            What looks at both once more: to be called between steps that do not ask the model.

        Raises:
            Refused: 504.
            Left: the session has closed its stream, or not opened one within `OPENED` seconds.
        """
        start, seen = time.monotonic(), False

        def check(spent: float) -> None:
            nonlocal seen
            check_time(spent, self.limits.seconds)
            if session is not None:
                seen = seen or session in self.listening
                if session not in self.listening and (seen or spent > OPENED):
                    raise Left

        def check_now() -> None:
            check(time.monotonic() - start)

        with watched(self.parts, check):
            yield check_now
        check_now()
