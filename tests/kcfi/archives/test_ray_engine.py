"""The engine `ray`: real Ray on this machine, whose actors are killed."""

import os
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest

from kcfi.archives.blocks import read_rows
from kcfi.archives.calls import only_call
from kcfi.archives.job import WORK, Job, prepare
from kcfi.archives.pairs import find_pairs
from kcfi.archives.run import describe_archive
from tests.kcfi.archives.conftest import digest, table

ray_engine = pytest.importorskip("kcfi.archives.ray_engine", exc_type=ValueError)

RAY = ("--engine", "ray", "--workers", 1, "--block", 1)


def actor(driver):
    """The process of the only actor of a run."""
    below = psutil.Process(driver).children(recursive=True)
    return next((one for one in below if "MapWorker" in " ".join(one.cmdline())), None)


def kill_when(process, written):
    """Kill the actor of a run once `written` holds, which has begun a block."""
    while not written():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(actor(process.pid).pid, signal.SIGKILL)


def test_ray_writes_the_rows_of_one_process_and_is_asked_for_nothing_else(folders, detector, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (folders / "B" / "pair_1.png").write_bytes(b"no image")
    pairs, job = find_pairs(folders / "A", folders / "B"), Job({"model": str(detector), "device": None}, regions=True)
    list(describe_archive(pairs, folders / "local", job, block=2))
    yielded = list(describe_archive(pairs, folders / "ray", job, "ray", block=2, workers=1))
    assert sorted(len(rows) for rows in yielded) == [1, 2, 2, 2]
    assert digest(folders / "local") == digest(folders / "ray") and len(table(folders / "ray")) == 7
    assert not ray_engine.ray.is_initialized() and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_block_whose_process_died_too_often_becomes_errors_and_others_are_done(folders, detector):
    job = Job({"model": str(detector)})
    prepare(folders / "out", find_pairs(folders / "A", folders / "B"), job, "w", block=3)
    with only_call(folders / "out") as call:
        actor = ray_engine.Actor(str(folders / "out"), call)
    (folders / "out" / WORK / "tries" / "1").write_bytes(b"." * ray_engine.TRIES)
    (folders / "out" / WORK / "tries" / "2").write_bytes(b"." * (ray_engine.TRIES - 1))
    batch = {"block": np.array([1, 2])}
    assert actor(batch) is batch
    first, second = (read_rows(path) for path in sorted((folders / "out").glob("rows-*")))
    assert [row["error"] for row in first] == ["the process ended 3 times while it did the block of this pair"] * 3
    assert [row["error"] for row in second] == [None]


@pytest.mark.slow
def test_the_table_is_the_same_though_an_actor_was_killed(large, command, start, tmp_path):
    folder, output = large(5), tmp_path / "killed"
    subprocess.run(**command(folder, tmp_path / "whole", "--block", 1), capture_output=True, check=True)
    process = start(folder, output, *RAY)
    kill_when(process, lambda: len(list((output / WORK / "tries").glob("*"))) >= 2)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert digest(output) == digest(tmp_path / "whole") and len(table(output)) == 5


@pytest.mark.slow
def test_a_driver_that_was_killed_loses_nothing_that_is_finished(large, command, start, tmp_path):
    folder, output = large(5), tmp_path / "killed"
    subprocess.run(**command(folder, tmp_path / "whole", "--block", 1), capture_output=True, check=True)
    process = start(folder, output, *RAY)
    while len(list(output.glob("rows-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(below, timeout=60)
    agents = [process for process in alive if process.status() == psutil.STATUS_ZOMBIE or "Agent" in process.name()]
    assert gone and agents == alive  # actors end with who started them; Ray's agents take longer, and do no work
    finished = {path.name: path.stat().st_mtime_ns for path in output.glob("rows-*")}
    assert 2 <= len(finished) < 5
    subprocess.run(**command(folder, output, *RAY), capture_output=True, check=True)
    assert digest(output) == digest(tmp_path / "whole")
    assert {path.name: path.stat().st_mtime_ns for path in output.glob("rows-*")}.items() >= finished.items()


@pytest.mark.slow
def test_a_block_that_kills_its_process_each_time_ends_as_errors(large, start, tmp_path):
    folder, output = large(2), tmp_path / "out"
    process = start(folder, output, *RAY)
    tries = output / WORK / "tries" / "0"
    for number in range(1, ray_engine.TRIES + 1):
        kill_when(process, lambda number=number: tries.exists() and tries.stat().st_size == number)
    process.communicate()
    assert process.returncode == 1
    first, second = table(output)
    assert first["error"] == "the process ended 3 times while it did the block of this pair"
    assert second["error"] is None and second["caption"]
