"""What is to do, and which folders are refused."""

import json

import pyarrow as pa
import pytest

from kcfi.archives.blocks import IMAGES, finished, texts, write_block
from kcfi.archives.job import WORK, Job, Todo, prepare, read_job, refuse, refused
from kcfi.archives.pairs import PAIRS
from kcfi.models import weights_of
from kcfi.processing import InputError

JOB = Job({"model": "tiny", "dtype": None, "device": "cpu", "batch_size": 8}, {"stretch": [2, 98]})


def pairs(*names, before="/A"):
    return pa.table(
        [list(names), [f"{before}/{name}" for name in names], [f"/B/{name}" for name in names]], PAIRS.names
    )


def do(output, number, **errors):
    """Write a block as an engine would, with errors by name."""
    todo, empty = Todo(output), dict.fromkeys(IMAGES.names)
    rows = [{**empty, **row, "error": errors.get(row["name"])} for row in todo.rows(number)]
    for row in rows:
        del row["position"]
    write_block(todo.path(number), pa.Table.from_pylist(rows, IMAGES))


def names(output):
    """The names of each block to do."""
    todo = Todo(output)
    return [[row["name"] for row in todo.rows(number)] for number in range(len(todo))]


def test_pairs_are_cut_into_blocks_in_their_order(tmp_path):
    assert prepare(tmp_path, pairs(*"abcdefg"), JOB, "w", block=3) == 0
    assert names(tmp_path) == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert Todo(tmp_path).rows(2) == [{"name": "g", "before": "/A/g", "after": "/B/g", "position": 6}]
    assert read_job(tmp_path) == JOB
    with pytest.raises(ValueError, match="block=0 must be at least 1"):
        prepare(tmp_path, pairs("a"), JOB, "w", block=0)


def test_what_is_left_after_a_stop_are_the_blocks_of_the_first_call(tmp_path):
    prepare(tmp_path, pairs(*"abcdefg"), JOB, "w", block=2)
    paths = [Todo(tmp_path).path(number) for number in range(4)]
    do(tmp_path, 1)
    part = tmp_path / f".{paths[0].name}.1234"  # of a process that was killed while it wrote
    part.write_bytes(b"PAR1")
    assert prepare(tmp_path, pairs(*"abcdefg"), JOB, "w", block=2) == 2
    assert [Todo(tmp_path).path(number) for number in range(3)] == [paths[0], paths[2], paths[3]]
    assert not part.exists()


def test_a_longer_list_has_only_its_new_pairs_to_do(tmp_path):
    prepare(tmp_path, pairs(*"bd"), JOB, "w", block=2)
    do(tmp_path, 0)
    assert prepare(tmp_path, pairs(*"abcde"), JOB, "w", block=2) == 2
    assert names(tmp_path) == [["a", "c"], ["e"]]
    do(tmp_path, 0)
    do(tmp_path, 1)
    assert len({path.name for path in tmp_path.glob("rows-*.parquet")}) == 3
    assert prepare(tmp_path, pairs(*"abcde"), JOB, "w", block=2) == 5 and names(tmp_path) == []


def test_errors_are_done_again_only_when_that_is_asked_for(tmp_path):
    prepare(tmp_path, pairs(*"abcd"), JOB, "w", block=2)
    do(tmp_path, 0, b="broken")
    do(tmp_path, 1, c="broken", d="broken")
    assert prepare(tmp_path, pairs(*"abcd"), JOB, "w", block=2) == 4 and names(tmp_path) == []
    assert prepare(tmp_path, pairs(*"abcd"), JOB, "w", block=2, retry=True) == 1
    assert names(tmp_path) == [["b", "c"], ["d"]]


@pytest.mark.parametrize(
    ("job", "weights", "message"),
    [
        (Job({**JOB.describer, "dtype": "float16"}, JOB.reading), "w", "with dtype=None, not float16"),
        (Job({**JOB.describer, "model": "other"}, JOB.reading), "w", "with model=tiny, not other"),
        (Job(JOB.describer), "w", r"with stretch=\[2, 98\], not None"),
        (Job(JOB.describer, JOB.reading, regions=True), "w", "with regions=False, not True"),
        (Job(JOB.describer, JOB.reading, scene={"align": True}), "w", "with align=None, not True"),
        (JOB, "v", "with weights=w, not v"),
    ],
)
def test_another_model_and_other_options_are_not_mixed_into_a_table(tmp_path, job, weights, message):
    prepare(tmp_path, pairs(*"ab"), JOB, "w", block=1)
    do(tmp_path, 0)
    with pytest.raises(ValueError, match=f"{message}: choose another --output"):
        prepare(tmp_path, pairs(*"ab"), job, weights, block=1)
    assert read_job(tmp_path) == JOB and len(Todo(tmp_path)) == 2


def test_device_batch_and_limits_may_change_between_calls(tmp_path):
    prepare(tmp_path, pairs(*"ab"), JOB, "w", block=1)
    do(tmp_path, 0)
    changed = {"device": "cuda", "batch_size": 1, "revision": "the commit, which `weights` is already"}
    other = Job({**JOB.describer, **changed}, {**JOB.reading, "max_image_pixels": 10**9})
    assert prepare(tmp_path, pairs(*"ab"), other, "w", block=5) == 1 and read_job(tmp_path) == other


def test_a_call_that_did_nothing_holds_no_other_up(tmp_path):
    prepare(tmp_path, pairs("a"), Job({**JOB.describer, "alarm_rate": 0.1}), "w", block=1)
    assert prepare(tmp_path, pairs("a"), JOB, "w", block=1) == 0


def test_other_images_of_the_same_names_are_refused(tmp_path):
    prepare(tmp_path, pairs(*"ab"), JOB, "w", block=2)
    do(tmp_path, 0)
    with pytest.raises(ValueError, match="describes other images as 'a': choose another --output"):
        prepare(tmp_path, pairs(*"ac", before="/C"), JOB, "w", block=2)
    assert prepare(tmp_path, pairs("c", before="/C"), JOB, "w", block=2) == 0  # beside the others


def test_a_folder_with_a_table_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "captions.csv").write_text("filename,words\na,b\n")
    with pytest.raises(ValueError, match=r"holds a captions.csv that is of no archive: choose another --output"):
        prepare(tmp_path, pairs("a"), JOB, "w", block=1)
    assert [path.name for path in tmp_path.iterdir()] == ["captions.csv"]


def test_the_record_says_in_json_what_the_table_was_made_with(tmp_path):
    prepare(tmp_path, pairs("a"), JOB, "w", block=1)
    settings = json.loads((tmp_path / "archive.json").read_text())["settings"]
    assert settings["describer"] == {"model": "tiny", "dtype": None} and settings["weights"] == "w"
    assert settings["reading"] == {"stretch": [2, 98]} and (tmp_path / WORK).is_dir()


def test_names_are_looked_up_in_columns_that_do_not_end_at_two_gib(tmp_path):
    assert texts(pairs(*"ab"), "name").type == texts(finished(tmp_path), "name").type == pa.large_string()
    many = pa.concat_tables([pairs(name) for name in "abc"])  # in chunks
    prepare(tmp_path, many, JOB, "w", block=2)
    do(tmp_path, 0)
    assert prepare(tmp_path, many, JOB, "w", block=2) == 2 and names(tmp_path) == [["c"]]


def test_a_folder_with_rows_twice_is_refused(tmp_path):
    prepare(tmp_path, pairs(*"ab"), JOB, "w", block=2)
    do(tmp_path, 0)
    [rows] = tmp_path.glob("rows-*")
    (tmp_path / "rows-000000001-x.parquet").write_bytes(rows.read_bytes())
    with pytest.raises(ValueError, match="has 2 rows twice"):
        prepare(tmp_path, pairs(*"ab"), JOB, "w", block=2)


def test_what_is_to_do_can_be_let_go_of(tmp_path):
    prepare(tmp_path, pairs("a"), JOB, "w", block=1)
    todo = Todo(tmp_path)
    todo.close()
    assert todo.map.closed


def test_why_a_job_was_refused_is_forgotten_by_the_next_call(tmp_path):
    prepare(tmp_path, pairs("a"), JOB, "w", block=1)
    assert refused(tmp_path) is None
    refuse(tmp_path, InputError("no head"))
    assert refused(tmp_path) == "no head"
    prepare(tmp_path, pairs("a"), JOB, "w", block=1)
    assert refused(tmp_path) is None


@pytest.mark.parametrize("name", ["model.safetensors", "processor_config.json", "chat_template.jinja"])
def test_a_model_with_other_weights_or_settings_is_another(tmp_path, name):
    (tmp_path / name).write_text("1")
    before = weights_of(str(tmp_path))
    (tmp_path / "README.md").write_text("of no matter")
    assert weights_of(str(tmp_path)) == before
    (tmp_path / name).write_text("2")
    assert weights_of(str(tmp_path)) != before
