"""A block of pairs -> a block of the table."""

import shutil

import pytest

from kcfi.archives.job import Job, Todo, prepare
from kcfi.archives.pairs import find_pairs
from kcfi.archives.work import Worker, check_job
from tests.kcfi.archives.conftest import table


@pytest.fixture
def output(folders, detector):
    job = Job({"model": str(detector)}, regions=True)
    prepare(folders / "out", find_pairs(folders / "A", folders / "B"), job, "w", block=4)
    return folders / "out"


def test_a_block_becomes_rows_that_a_second_call_leaves_alone(output, detector):
    worker = Worker(output)
    worker(1)
    assert [row["name"] for row in table(output)] == ["pair_4", "pair_5", "pair_6"]
    for row in table(output):
        assert row["caption"] and row["error"] is None and row["model"] == str(detector)
        assert all(value == round(value, 6) for value in (row["score"], row["changed_fraction"]))
    before = Todo(output).path(1).stat().st_mtime_ns
    worker(1)
    assert Todo(output).path(1).stat().st_mtime_ns == before


def test_weights_lie_in_memory_as_they_do_in_every_process(output):
    weights = Worker(output).describer.model.state_dict().values()
    assert {one.data_ptr() % 64 for one in weights} == {0}  # in the file they lie anywhere


def test_a_block_that_is_given_up_is_rows_with_the_reason(output):
    worker = Worker(output)
    worker.give_up(0, "it ended")
    worker.give_up(0, "what is written stays")
    rows = table(output)
    assert [row["name"] for row in rows] == [f"pair_{number}" for number in range(4)]
    assert all(row["error"] == "it ended" and row["caption"] is None and row["after"] for row in rows)


@pytest.mark.parametrize("asked", [{"regions": True}, {"scene": {}}])
def test_what_the_model_cannot_do_is_refused_before_the_first_block(folders, make_detector, tmp_path, asked):
    model = make_detector(tmp_path / "model", use_change_detection_head=False)
    job = Job({"model": str(model)}, **asked)
    prepare(folders / "out", find_pairs(folders / "A", folders / "B"), job, "w", block=4)
    with pytest.raises(ValueError, match="no change detection head"):
        Worker(folders / "out")
    with pytest.raises(ValueError, match="no change detection head"):
        check_job(job)


def test_a_job_is_checked_without_weights_and_without_the_machine_of_a_worker(detector, tmp_path):
    model = shutil.copytree(detector, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    describer = {"model": str(model), "device": "nowhere", "speed": "bf16"}
    check_job(Job(describer, regions=True))
    with pytest.raises(ValueError, match="A tile of 2 px is smaller than a patch"):
        check_job(Job({**describer, "tile": 2}))


def test_a_tower_of_timm_is_checked_without_weights_and_a_model_that_is_nowhere_is_refused():
    check_job(Job({"model": "kcfi-tiny", "alarm_rate": 0.05}, regions=True))
    with pytest.raises(ValueError, match="Cannot load the model 'nobody/nothing'"):
        check_job(Job({"model": "nobody/nothing"}))
