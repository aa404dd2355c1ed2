"""Damaged files: every reader reads or refuses them. `make fuzz` tries thousands, Hypothesis here the smallest."""

import signal
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import mutate
from tests.fuzz import READERS, Row, judge, supervise, table
from tests.fuzz_readers import Seeds

KEPT = sorted(path for path in (Path(__file__).parent / "fuzz_inputs").glob("*/*") if path.is_file())
SLOW = ("config", "processor", "tokenizer", "weights")  # load a model: few of them here


@pytest.fixture(scope="module")
def seeds_of(tmp_path_factory):
    """The seeds of a reader, made once, and a folder for its inputs."""

    @cache
    def make(reader):
        return READERS[reader][1](tmp_path_factory.mktemp(reader)), tmp_path_factory.mktemp("inputs")

    return make


def answer(made: tuple[Seeds, Path], name: str, content: bytes) -> str:
    seeds, folder = made
    path = folder / name
    path.write_bytes(content)
    try:
        return judge(seeds, path)
    finally:
        path.unlink()


def is_proper(verdict: str) -> bool:
    return ":" not in verdict and verdict != "hang"


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_read_or_refused(seeds_of, reader):
    made = seeds_of(reader)

    @settings(
        max_examples=3 if reader in SLOW else 15,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(sorted(made[0].files)), st.randoms(use_true_random=False))
    def try_one(name, chance):
        verdict = answer(made, name, made[0].mutate(made[0].files[name], chance))
        assert is_proper(verdict), verdict

    try_one()


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_input_that_has_found_a_mistake_finds_none_now(seeds_of, path):
    verdict = answer(seeds_of(path.parent.name), path.name.partition("-")[2], path.read_bytes())
    assert is_proper(verdict), verdict


def test_a_reader_that_raises_hangs_or_prints_is_told_apart(tmp_path):
    def of(read):
        return judge(Seeds({}, mutate.raw, read), tmp_path)

    def lasting(path):
        signal.setitimer(signal.ITIMER_PROF, 0.05)  # instead of ten seconds
        while True:
            pass

    assert of(lambda path: print("x")) == "read"
    assert of(lambda path: path.joinpath("none").read_bytes()) == "FileNotFoundError"
    assert of(lambda path: {}["a"]).startswith("crash: KeyError")
    assert of(lasting) == "hang"


def test_the_same_inputs_are_tried_in_processes_of_their_own_and_counted():
    row = Row()
    for said in supervise([("question", 3), ("question", 5)]):
        row.add(said)
    cells = row.cells("question")
    assert (cells["inputs"], cells["crashes"], cells["hangs"]) == (2, 0, 0)
    assert table([cells, cells]).splitlines()[-1].startswith("| all | 4 |")
