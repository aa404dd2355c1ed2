"""The engine `accelerate`: the rows of one process, by two; and what a killed one leaves."""

import os
import signal
import subprocess
import time

import psutil
import pytest

from kcfi.archives import calls
from kcfi.archives.job import Job, read_job
from kcfi.archives.pairs import find_pairs
from kcfi.archives.run import describe_archive
from tests.kcfi.archives.conftest import digest, table

pytestmark = pytest.mark.slow


def workers(parent):
    """Processes below another that do blocks, and not those that start them."""
    below = psutil.Process(parent).children(recursive=True)
    return [one for one in below if "kcfi.archives.processes" in " ".join(one.cmdline()) and not one.children()]


def wait_for_rows(output, process):
    while not list(output.glob("rows-*")):
        assert process.poll() is None
        time.sleep(0.05)


def test_two_processes_write_the_rows_of_one(folders, detector, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pairs, job = find_pairs(folders / "A", folders / "B"), Job({"model": str(detector), "device": None}, regions=True)
    (folders / "B" / "pair_1.png").write_bytes(b"no image")
    list(describe_archive(pairs, folders / "one", job, block=2))
    yielded = list(describe_archive(pairs, folders / "two", job, "accelerate", block=2, workers=2))
    assert sorted(len(rows) for rows in yielded) == [1, 2, 2, 2]
    assert digest(folders / "one") == digest(folders / "two") and len(table(folders / "two")) == 7


def test_what_a_killed_process_leaves_is_done_by_the_next_call(large, command, start, tmp_path):
    folder = large(4)
    subprocess.run(**command(folder, tmp_path / "whole", "--block", 1), capture_output=True, check=True)
    options = ("--engine", "accelerate", "--workers", 2, "--block", 1)
    process = start(folder, tmp_path / "killed", *options)
    wait_for_rows(tmp_path / "killed", process)
    os.kill(workers(process.pid)[0].pid, signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 2 and "what is finished is kept: start the same command again" in said
    assert 1 <= len(table(tmp_path / "killed")) < 4
    subprocess.run(**command(folder, tmp_path / "killed", *options), capture_output=True, check=True)
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_no_call_begins_beside_processes_that_outlive_the_one_that_started_them(large, start, tmp_path, monkeypatch):
    """Failed before: it began at once, and both wrote."""
    folder, output = large(6), tmp_path / "out"
    process = start(folder, output, "--engine", "accelerate", "--workers", 1, "--block", 1)
    wait_for_rows(output, process)
    [worker] = workers(process.pid)
    worker.suspend()  # so that it does not notice
    process.kill()
    process.wait()
    pairs, job = find_pairs(folder / "A", folder / "B"), Job(read_job(output).describer)
    monkeypatch.setattr(calls, "PATIENCE", 1)
    with pytest.raises(ValueError, match="a worker of an earlier call is still at work there"):
        next(describe_archive(pairs, output, job, block=1))
    worker.resume()
    monkeypatch.setattr(calls, "PATIENCE", 60)
    list(describe_archive(pairs, output, job, block=1))
    assert not worker.is_running() and len(table(output)) == 6 and not (output / ".work").exists()


def test_the_processes_end_with_the_one_that_started_them(large, start, tmp_path):
    options = ("--engine", "accelerate", "--workers", 2, "--block", 1)
    process = start(large(8), tmp_path / "out", *options)
    wait_for_rows(tmp_path / "out", process)
    below = workers(process.pid)
    assert len(below) == 2
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(below, timeout=20)
    assert len(gone) == 2 and alive == [] and len(table(tmp_path / "out")) < 8
