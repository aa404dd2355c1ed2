"""A list from its pairs to its table: what is printed and counted, and that nothing is lost by a kill."""

import csv
import json
import os
import random
import signal
import subprocess
import time

import pytest

from kcfi.archives.job import Job
from kcfi.archives.pairs import find_pairs
from kcfi.archives.run import describe_archive
from kcfi.archives.work import Worker
from kcfi_cli import main
from tests.kcfi.archives.conftest import SIZES, digest, table

ENGINES = [("--engine", engine, "--workers", 1) for engine in ("accelerate", "ray")]


@pytest.fixture
def caption(folders, detector):
    """Run `kcfi caption` of both folders into out/; its exit code."""

    def run(*options):
        images = [str(folders / "A"), str(folders / "B")]
        return main(["caption", *images, "--model", str(detector), "--output", str(folders / "out"), *options])

    return run


def coverage(output):
    return json.loads((output / "coverage.json").read_text())


def test_a_list_is_printed_and_counted(caption, folders, capsys):
    assert caption("--block", "3", "--regions", "--heatmap") == 0
    *lines, total, counts = capsys.readouterr().out.splitlines()
    rows = table(folders / "out")
    assert [line.partition(": ")[0] for line in lines] == [row["name"] for row in rows]
    assert lines[0] == f"pair_0: {rows[0]['caption']} ({rows[0]['changed_fraction']:.1%})"
    assert total == f"7 of 7 pairs: {folders / 'out' / 'captions.csv'}" and counts.startswith(
        "0 failed, 0 were there;"
    )
    with (folders / "out/captions.csv").open(newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [row["caption"] for row in written] == [row["caption"] for row in rows]
    assert json.loads(written[3]["regions"]) == rows[3]["regions"] and (folders / "out" / rows[3]["heatmap"]).is_file()
    assert not (folders / "out/.work").exists() and len(list((folders / "out").glob("rows-*"))) == 3


def test_a_broken_pair_is_a_row_and_is_tried_again_only_with_retry(caption, folders, capsys):
    whole = (folders / "B" / "pair_1.png").read_bytes()
    (folders / "B" / "pair_1.png").write_bytes(whole[:60])
    (folders / "A" / "pair_4.png").unlink()
    (folders / "A" / "pair_4.png").mkdir()
    assert caption() == 1
    printed = capsys.readouterr().out.splitlines()
    rows = table(folders / "out")
    assert "pair_1.png" in rows[1]["error"] and not rows[1]["caption"] and f"pair_1: {rows[1]['error']}" in printed
    assert [number for number, row in enumerate(rows) if row["error"]] == [1, 4]
    counted = coverage(folders / "out")
    assert (counted["pairs"], counted["done"], counted["failed"], counted["skipped"]) == (7, 5, 2, 0)
    assert sum(counted["reasons"].values()) == 2 and all("pair" not in reason for reason in counted["reasons"])
    assert all("AFTER" in reason or "BEFORE" in reason for reason in counted["reasons"])

    (folders / "B" / "pair_1.png").write_bytes(whole)
    assert caption("--json") == 1 and capsys.readouterr().out == ""  # nothing to do, and still not all there
    assert coverage(folders / "out")["skipped"] == 7 and coverage(folders / "out")["failed"] == 2
    assert caption("--json", "--retry") == 1
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["name"], row["error"] is None) for row in again] == [("pair_1", True), ("pair_4", False)]
    assert [row["name"] for row in table(folders / "out")] == [f"pair_{number}" for number in range(len(SIZES))]


def test_reasons_that_differ_in_files_and_numbers_alone_are_one(folders, detector):
    for number in (0, 2):
        (folders / "B" / f"pair_{number}.png").write_bytes(b"no image" * number)
    pairs = find_pairs(folders / "A", folders / "B")
    list(describe_archive(pairs, folders / "out", Job({"model": str(detector)}), block=2))
    [(reason, count)] = coverage(folders / "out")["reasons"].items()
    assert count == 2 and reason.startswith("AFTER: cannot be read as an image")


def test_a_bug_ends_the_run_and_what_was_done_before_is_kept(folders, detector, monkeypatch):
    def fails(path, *_, **reading):
        if path.name == "pair_5.png":
            raise ValueError("operands could not be broadcast together")
        return read(path, *_, **reading)

    from kcfi.archives import images

    read = images.read_pair
    monkeypatch.setattr(images, "read_pair", fails)
    pairs, job = find_pairs(folders / "A", folders / "B"), Job({"model": str(detector)})
    with pytest.raises(ValueError, match="broadcast"):
        list(describe_archive(pairs, folders / "out", job, block=2))
    assert len(table(folders / "out")) == 4 and coverage(folders / "out")["done"] == 4
    monkeypatch.setattr(images, "read_pair", read)
    assert [len(rows) for rows in describe_archive(pairs, folders / "out", job, block=2)] == [2, 1]


def test_other_blocks_change_the_last_digits_at_most(folders, detector):
    pairs, job = find_pairs(folders / "A", folders / "B"), Job({"model": str(detector)})
    list(describe_archive(pairs, folders / "one", job, block=100))
    list(describe_archive(pairs.slice(2, 3), folders / "two", job, block=1))
    list(describe_archive(pairs, folders / "two", job, block=3))
    for one, two in zip(table(folders / "one"), table(folders / "two"), strict=True):
        numbers = {name: pytest.approx(value, abs=1e-4) for name, value in two.items() if isinstance(value, float)}
        assert one == two | numbers and len(numbers) == 3


def test_a_list_of_urls_gives_the_captions_of_its_files(folders, detector, capsys):
    rows = "".join(f"file://{folders}/A/pair_{n}.png,file://{folders}/B/pair_{n}.png\n" for n in range(3))
    (folders / "pairs.csv").write_text("before,after\n" + rows)
    arguments = ["--model", str(detector), "--no_pictures", "--output", str(folders / "out")]
    assert main(["caption", str(folders / "pairs.csv"), *arguments]) == 0
    pairs = find_pairs(folders / "A", folders / "B").slice(0, 3)
    list(describe_archive(pairs, folders / "files", Job({"model": str(detector)})))
    told, expected = ([row["caption"] for row in table(folders / name)] for name in ("out", "files"))
    assert told == expected and not list((folders / "out").glob("*.png"))


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again_the_table_is_the_same(large, command, start, tmp_path):
    folder, chance, output = large(5), random.Random(5), tmp_path / "killed"
    subprocess.run(**command(folder, tmp_path / "whole", "--block", 1), capture_output=True, check=True)
    for kill in range(1, 4):
        process = start(folder, output, "--block", 1)
        while len(list(output.glob("rows-*"))) < kill:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert kill <= len(table(output)) < 5
    subprocess.run(**command(folder, output, "--block", 1), capture_output=True, check=True)
    assert digest(output) == digest(tmp_path / "whole") and len(table(output)) == 5
    pictures = [sorted(path.name for path in where.glob("*.png")) for where in (output, tmp_path / "whole")]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 10 and not (output / ".work").exists()


@pytest.mark.parametrize("options", [["--workers", "0"], ["--engine", "ray", "--workers", "2", "--device", "cuda:1"]])
def test_workers_that_cannot_be_are_refused_before_anything_is_written(caption, folders, capsys, options):
    assert caption(*options) == 2 and not (folders / "out" / "archive.json").exists()
    assert "must be at least 1" in (said := capsys.readouterr().err) or "cuda:1 is one device" in said


@pytest.mark.parametrize("engine", ["local", "accelerate", "ray"])
def test_a_bad_setting_is_told_before_an_engine_is_started(caption, folders, capfd, engine):
    """Failed before: a worker told it, so Ray or accelerate was started first."""
    assert caption("--engine", engine, "--workers", "1", "--alarm_rate", "5") == 2
    assert capfd.readouterr().err.strip().startswith("kcfi: error: alarm_rate=5.0")
    assert not (folders / "out").exists()


@pytest.mark.parametrize("engine", ["local", pytest.param("accelerate", marks=pytest.mark.slow), "ray"])
def test_a_device_that_no_worker_has_ends_in_the_same_line_from_every_engine(caption, capfd, engine):
    if engine == "ray":
        pytest.importorskip("ray")
    assert caption("--engine", engine, "--workers", "1", "--device", "nowhere") == 2
    said = capfd.readouterr().err
    assert said.strip().splitlines()[-1].startswith("kcfi: error: --device nowhere: ")
    assert engine == "accelerate" or "Traceback" not in said  # accelerate's own processes print theirs


def test_every_process_loads_the_commit_that_the_hub_had_when_the_call_began(folders, hub_detectors, tmp_path):
    """Failed before: each looked the id up anew, and with transformers 5.24 no id was found."""
    old, new = hub_detectors.values()
    pairs, output = find_pairs(folders / "A", folders / "B"), folders / "out"
    running = describe_archive(pairs, output, Job({"model": "me/detector"}), block=3)
    next(running)
    (tmp_path / "hub/models--me--detector/refs/main").write_text(new)
    head = Worker(output).describer.model.model.change_detection_head
    assert head.classifier.bias[0].item() == 0.25
    running.close()
    with pytest.raises(ValueError, match=f"with weights={old}, not {new}: choose another --output"):
        next(describe_archive(pairs, output, Job({"model": "me/detector"}), block=3))
    assert {row["model"] for row in table(output)} == {"me/detector"}


@pytest.mark.parametrize("options", [(), *(pytest.param(engine, marks=pytest.mark.slow) for engine in ENGINES)])
def test_ctrl_c_leaves_the_table_of_what_is_finished_and_says_how_to_go_on(large, start, tmp_path, options):
    """Failed before: nothing was said."""
    if "ray" in options:
        pytest.importorskip("ray")
    output = tmp_path / "out"
    process = start(large(40), output, "--block", 1, *options)
    while not list(output.glob("rows-*")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert f"Stopped. What is finished stands in {output / 'captions.csv'}; the same command does the rest." in said
    assert "Traceback" not in said
    with (output / "captions.csv").open(newline="", encoding="utf-8") as file:
        written = [row["name"] for row in csv.DictReader(file)]
    assert 1 <= len(written) < 40 and written == [row["name"] for row in table(output)]
    assert coverage(output)["done"] == len(written)
