"""SIGTERM, by which schedulers announce the end of a job, stops a training behind the step that it is in."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback


class StopCallback(TrainerCallback):
    """Saves a checkpoint and ends the training at the step on which all ranks agree.

    Of an epoch that is over at that step, evaluation comes first, as ever, so that a resumed run does not lack it.

    Attributes:
        received: this process got SIGTERM.
        agreed: a rank got it before this step: set by the trainer, alike on all ranks.
    """

    def __init__(self) -> None:
        self.received = self.agreed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM is noted instead of ending the process; only the main thread can ask for that."""
        self.received = self.agreed = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    def _note(self, *_: Any) -> None:
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Behind Trainer's own decisions about this step."""
        if self.agreed:
            control.should_training_stop = True
            control.should_save = not _ends_epoch(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer also takes the end of a training for the end of an epoch."""
        if self.agreed and _ends_epoch(state):
            control.should_save = True
        elif self.agreed:
            control.should_log = control.should_evaluate = control.should_save = False


def _ends_epoch(state: Any) -> bool:
    return float(state.epoch).is_integer()


def outliving(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Have the workers of a loader outlive SIGTERM, which often goes to all processes of a job: the step needs them.

    It is blocked before they are forked: torch gives them a handler that ends them.
    """
    if not hasattr(signal, "sigwaitinfo"):  # only Linux says who sent a signal
        return loader
    inner: Any = getattr(loader, "base_dataloader", loader)  # where accelerate has wrapped it
    begin: Any = inner._get_iterator

    def begin_blocked() -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return begin()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
    inner._get_iterator = begin_blocked
    return loader


def _start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    threading.Thread(target=_end_by_parent, daemon=True).start()
    if start is not None:
        start(worker)


def _end_by_parent() -> None:
    """A parent that exits sends SIGTERM to its workers, and waits for them."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
