"""What a stop at any moment leaves behind, and what a disk that is full or cannot be written to does to a run."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kcfi.training import checkpoints, train
from kcfi.training.checkpoints import MARKER, UNFINISHED, complete_checkpoints, is_complete, mark, step_of


def write(run, step, name=None):
    """A checkpoint of a step, with a file and a folder."""
    folder = checkpoints.begin(run)
    (folder / "global_step").mkdir()
    (folder / "global_step" / "optimizer.pt").write_bytes(b"12345")
    (folder / "model.safetensors").write_bytes(b"123")
    checkpoints.flush(folder)
    checkpoints.publish(run, run / (name or f"checkpoint-{step}"), step)
    return run / (name or f"checkpoint-{step}")


MOUNT, UMOUNT = shutil.which("mount"), shutil.which("umount")  # before a test hides Java, and all else on the PATH


@pytest.fixture
def disk(tmp_path):
    """A disk of 3 MiB, and a function that makes it read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if not (MOUNT and UMOUNT) or subprocess.run([MOUNT, *options], capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a disk for a test, and not in every container")
    yield folder, lambda: subprocess.run([MOUNT, "-o", "remount,ro", str(folder)], check=True)
    subprocess.run([UMOUNT, str(folder)], check=True)


def test_the_newest_checkpoint_is_found_by_its_marker_and_not_by_its_number(tmp_path):
    write(tmp_path, 9)
    write(tmp_path, 10, "checkpoint-best")
    write(tmp_path, 12, "stage2")  # another run, which is finished
    shutil.copytree(write(tmp_path, 11), tmp_path / ".hidden")
    (tmp_path / "checkpoint-11" / MARKER).unlink()
    (tmp_path / "checkpoint-12").mkdir()
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-9", tmp_path / "checkpoint-best"]
    assert train.find_checkpoint(tmp_path, resume=True) == str(tmp_path / "checkpoint-best")
    checkpoints.rotate(tmp_path, 1, None)
    assert (tmp_path / "stage2" / "model.safetensors").exists() and not (tmp_path / "checkpoint-9").exists()


def test_a_checkpoint_gets_its_name_with_its_marker_in_it(tmp_path, monkeypatch):
    seen = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: (seen.append(step_of(path)), rename(path, to)))
    write(tmp_path, 3)
    assert seen == [3]


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"files": []}', '{"files": {}, "step": Infinity}', "7", "{"])
def test_another_file_of_the_name_of_the_marker_is_none(tmp_path, text):
    (tmp_path / MARKER).write_text(text)
    assert step_of(tmp_path) is None


def test_only_files_that_a_run_has_written_are_flushed_and_marked(recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "dead").symlink_to("nowhere")
    os.mkfifo(run / "pipe")
    (run / "theirs.txt").touch()
    os.utime(run / "theirs.txt", (1, 1))
    flushed = []
    monkeypatch.setattr(checkpoints, "_flush", lambda path: flushed.append(path.name))
    train.main([str(recipe), "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"])
    assert "model.safetensors" in flushed and not {"theirs.txt", "dead", "pipe"} & set(flushed)
    assert step_of(run) == 1
    checkpoints.flush(run)  # nor do they hinder it
    assert "theirs.txt" in flushed and not {"dead", "pipe"} & set(flushed)


@pytest.mark.parametrize("file", [MARKER, "model.safetensors", "global_step/optimizer.pt"])
def test_a_checkpoint_that_was_copied_in_part_is_none(tmp_path, file):
    checkpoint = write(tmp_path, 3)
    assert step_of(checkpoint) == 3
    (checkpoint / file).write_bytes((checkpoint / file).read_bytes()[:-1])
    assert not is_complete(checkpoint)
    (checkpoint / file).unlink()
    assert not is_complete(checkpoint)


def test_what_a_stop_left_gives_way_to_the_next_checkpoint(tmp_path):
    write(tmp_path, 1)
    (checkpoints.begin(tmp_path) / "half.pt").touch()  # killed here
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-1"]
    (write(tmp_path, 2) / MARKER).unlink()  # or between its name and its marker
    write(tmp_path, 2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "checkpoint-2" / "half.pt").exists()


def test_the_oldest_go_but_neither_the_best_nor_the_newest(tmp_path):
    for step in (8, 9, 10, 11):
        write(tmp_path, step)
    checkpoints.rotate(tmp_path, None, None)
    checkpoints.rotate(tmp_path, 0, None)
    assert len(complete_checkpoints(tmp_path)) == 4
    checkpoints.rotate(tmp_path, 2, str(tmp_path / "checkpoint-8"))
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-11"]
    checkpoints.rotate(tmp_path, 1, "elsewhere/checkpoint-8")  # of a run that has moved
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-11"]
    checkpoints.rotate(tmp_path, 1, None)
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-11"]


def test_a_finished_run_may_get_further_files_but_not_lose_its_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"123")
    (tmp_path / "README.md").touch()
    mark(tmp_path, 5, tmp_path.glob("*.safetensors"))
    (tmp_path / "README.md").write_text("a card")
    assert step_of(tmp_path) == 5
    (tmp_path / "model.safetensors").write_bytes(b"1")
    assert not is_complete(tmp_path)


def test_other_errors_than_those_of_the_disk_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="of another kind"), checkpoints.writing(tmp_path, 1):
        raise RuntimeError("of another kind")


def test_a_run_that_would_not_fit_on_the_disk_is_refused_with_both_numbers(disk):
    folder, _ = disk
    mebibyte = 2**20
    checkpoints.check_space(folder, mebibyte, None, mebibyte // 2)
    checkpoints.check_space(folder, 0, 2, mebibyte)
    message = r"has 3 MiB free, and this run needs at least 4: 3 more checkpoint\(s\) of 1 MiB .*--save_total_limit 1"
    with pytest.raises(OSError, match=message):
        checkpoints.check_space(folder, mebibyte, 2, mebibyte)
    write(folder, 1)
    write(folder, 2)
    checkpoints.check_space(folder, mebibyte, 2, mebibyte)  # two of the three are there


def test_a_disk_that_fills_up_ends_a_run_with_its_last_checkpoint_whole(recipe, disk):
    folder, _ = disk
    steps = ["--max_steps", "6", "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "2"]
    options = [str(recipe), *steps, "--report_to", "none", "--output_dir", str(folder / "run")]
    filler = folder / "filler"

    class Filling(train.KCFITrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            if self.state.global_step == 4 and not filler.exists():
                filler.write_bytes(b" " * (shutil.disk_usage(folder).free - 4096))
            super()._save_optimizer_and_scheduler(output_dir)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "KCFITrainer", Filling)
        with pytest.raises(OSError, match=r"Step 4 could not be saved in .*run, .*go on from checkpoint-2 with --res"):
            train.main(options)
    assert not (folder / "run" / UNFINISHED).exists()
    assert complete_checkpoints(folder / "run") == [folder / "run" / "checkpoint-2"]
    filler.unlink()
    train.main([*options, "--resume"])
    assert step_of(folder / "run") == 6


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_loaded(recipe, disk, tmp_path):
    folder, make_read_only = disk
    make_read_only()
    options = [str(recipe), "--dataset", "not looked for", "--output_dir"]
    with pytest.raises(OSError, match=r"output_dir .*run/deep cannot be written to \(Read-only file system\): choose"):
        train.main([*options, str(folder / "run" / "deep")])
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match=r"cannot be written to \(Not a directory\)"):
        train.main([*options, str(file / "run")])


def test_the_recipe_of_a_run_is_never_half_written(recipe, tmp_path):
    from kcfi.training.arguments import parse_recipe

    train.save_recipe(parse_recipe(recipe), tmp_path / "run")
    before = (tmp_path / "run" / "recipe.yaml").stat().st_ino
    train.save_recipe(parse_recipe(recipe), tmp_path / "run")
    assert (tmp_path / "run" / "recipe.yaml").stat().st_ino != before  # another file took its place
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


def test_the_marker_says_step_and_sizes(tmp_path):
    marker = json.loads((write(tmp_path, 7) / MARKER).read_text())
    assert marker == {"step": 7, "files": {"model.safetensors": 3, "global_step/optimizer.pt": 5}}
