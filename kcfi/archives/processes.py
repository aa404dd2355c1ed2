"""The engine `accelerate`: processes of this machine, one per GPU or share of the cores, started by accelerate.

Process r of n does the blocks r, r + n, r + 2n and so on. What one that died leaves is for the next call.
"""

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState

from kcfi.archives.calls import join_call
from kcfi.archives.job import Todo, read_job
from kcfi.archives.work import Worker

POLL = 0.2  # s between two looks at what is done
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no"]


def run(output: Path, call: str, workers: int | None = None) -> Iterator[int]:
    """Do the blocks of an archive.

    Args:
        output: folder, where `prepare` was.
        call: that does it, see `only_call`.
        workers: processes; None = one per GPU, or one.

    Yields:
        The number of each block once it is written.

    Raises:
        ChildProcessError: a process died.
    """
    todo, count = Todo(output), workers or max(1, torch.cuda.device_count())
    paths = [todo.path(number) for number in range(len(todo))]
    waiting = [deque(range(first, len(todo), count)) for first in range(count)]  # of each process, as it does them
    command = [*LAUNCH, "--num_processes", str(count), *["--multi_gpu"] * (count > 1)]
    command += ["-m", "kcfi.archives.processes", str(output), call]
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    # nothing is written to the pipe: it closes with this process, however that ends, and ends those that read it; in a
    # session of their own they hear of no Ctrl-C, whose traceback each would print
    launcher = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
    try:
        ended = False
        while not ended:
            ended = launcher.poll() is not None
            for numbers in waiting:
                while numbers and paths[numbers[0]].exists():
                    yield numbers.popleft()
            time.sleep(0 if ended else POLL)
    finally:
        launcher.kill()
        launcher.communicate()  # closes the pipe
    if left := sum(map(len, waiting)):
        raise ChildProcessError(
            f"A process of {count} ended (exit code {launcher.returncode}) with {left} blocks to do; what is "
            "finished is kept: start the same command again."
        )


def main() -> None:
    """What each process does: `accelerate launch -m kcfi.archives.processes OUTPUT CALL`."""
    threading.Thread(target=_end_with_who_started_it, daemon=True).start()
    output = Path(sys.argv[1])
    with join_call(output, sys.argv[2]):
        device = read_job(output).describer["device"]
        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        worker = Worker(output, device or str(state.device))
        for number in range(state.process_index, len(worker.todo), state.num_processes):
            worker(number)


def _end_with_who_started_it() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
