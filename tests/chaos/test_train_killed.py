"""Short runs of the harness; docs/reliability.md has the long one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.conftest import needs_deepspeed


def stopped(*options):
    """Run the harness in a process of its own, since it forks; what its summary says."""
    command = [sys.executable, "-m", "tests.chaos.train_killed", *map(str, options)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
    found = re.search(
        r"(\d+) stops.*?(\d+) of (\d+) newest checkpoints load; (\d+) stops came before the first.*?"
        r"steps lost per stop: (\d+) at most, save interval (\d+).*?(\d+) runs finished; "
        r"of (\d+) visits of pairs lost (\d+), repeated (\d+)",
        done.stdout,
        re.DOTALL,
    )
    assert found, done.stdout
    names = ["stops", "loaded", "found", "early", "lost", "interval", "finished", "visits", "missed", "repeated"]
    seen = dict(zip(names, map(int, found.groups()), strict=True))
    assert seen["visits"] > 0 and seen["missed"] == seen["repeated"] == 0
    return seen


def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_is_not():
    seen = stopped("--kills", 4)
    assert seen["stops"] == 4 and seen["finished"] > 0
    assert seen["loaded"] == seen["found"] == 4 - seen["early"] > 0
    assert seen["lost"] <= seen["interval"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--signal", "TERM"], id="term"),
        pytest.param(["--workers", 2], id="workers"),
        pytest.param(["--workers", 2, "--signal", "TERM"], id="workers_term"),
        pytest.param(["--processes", 2], id="ddp"),
        pytest.param(["--processes", 2, "--signal", "TERM"], id="ddp_term"),
        pytest.param(["--processes", 2, "--deepspeed", "zero2"], id="zero2", marks=needs_deepspeed),
    ],
)
def test_so_does_one_with_workers_ranks_or_another_signal(options):
    seen = stopped("--kills", 3, *options)
    assert seen["stops"] == 3 and seen["finished"] > 0 and seen["loaded"] == seen["found"]
    assert seen["lost"] <= seen["interval"]
