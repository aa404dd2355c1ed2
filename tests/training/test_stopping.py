"""SIGTERM: a checkpoint at the step that is agreed on, exit code 0, and nothing else than in the uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import datasets
import psutil
import pytest
from torch.utils.data import DataLoader, get_worker_info
from transformers import TrainerCallback

from kcfi.training import train
from kcfi.training.checkpoints import MARKER, complete_checkpoints, is_complete, step_of
from kcfi.training.stopping import StopCallback, outliving
from kcfi_cli import main

TIMES = ("runtime", "per_second", "peak_memory")


class Terminated(TrainerCallback):
    """Sends SIGTERM to this process within a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def log_of(run):
    lines = json.loads((run / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in lines if "train_runtime" not in line]
    return [{name: value for name, value in line.items() if not any(t in name for t in TIMES)} for line in lines]


@pytest.mark.parametrize("strategy", ["epoch", "steps", "best"])
@pytest.mark.parametrize("stop", [3, 4, 5])  # the second of two epochs begins behind step 4
def test_a_run_stopped_by_sigterm_exits_with_0_and_resumes_as_if_it_had_not_been(
    recipe, tmp_path, capsys, monkeypatch, strategy, stop
):
    every = {"epoch": "epoch", "steps": "steps", "best": "epoch"}[strategy]
    options = ["train", str(recipe), "--save_strategy", strategy, "--eval_strategy", every, "--logging_steps", "3"]
    options += ["--eval_steps", "2", "--save_steps", "2", "--report_to", "none"]
    assert main([*options, "--output_dir", str(tmp_path / "full")]) == 0

    class Stopped(train.KCFITrainer):
        def __init__(self, *args, **kwargs):
            kwargs["callbacks"] = [Terminated(stop - 1)]  # noticed when the next step begins
            super().__init__(*args, **kwargs)

    options += ["--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(train, "KCFITrainer", Stopped)
        assert main(options) == 0
    assert f"Stopped by SIGTERM behind step {stop}: go on with --resume." in capsys.readouterr().out
    assert step_of(complete_checkpoints(tmp_path / "run")[-1]) == stop and not is_complete(tmp_path / "run")
    assert main([*options, "--resume"]) == 0
    assert log_of(tmp_path / "run") == log_of(tmp_path / "full")
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "full/model.safetensors").read_bytes()


def test_the_last_step_finishes_a_run_though_sigterm_came(recipe, tmp_path, monkeypatch):
    class Late(train.KCFITrainer):
        def __init__(self, *args, **kwargs):
            kwargs["callbacks"] = [Terminated(7)]  # of 8
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(train, "KCFITrainer", Late)
    train.main([str(recipe), "--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none"])
    assert step_of(tmp_path / "run") == 8


def test_outside_of_a_training_sigterm_means_what_it_meant():
    before, stop = signal.getsignal(signal.SIGTERM), StopCallback()
    with stop.listening():
        assert signal.getsignal(signal.SIGTERM) != before
        signal.raise_signal(signal.SIGTERM)
    assert stop.received and signal.getsignal(signal.SIGTERM) == before


def test_a_training_in_another_thread_listens_to_nothing():
    seen, stop = [], StopCallback()

    def listen():
        with stop.listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def start(worker):
    get_worker_info().dataset.append(worker)


outlives = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not say who sent a signal")


def terminated_by_another(pid):
    subprocess.run([sys.executable, "-c", f"import os; os.kill({pid}, {int(signal.SIGTERM)})"], check=True)


@outlives
def test_loader_workers_outlive_the_sigterm_of_others_and_end_by_that_of_their_parent():
    loader = iter(outliving(DataLoader([7, 8, 9], batch_size=None, num_workers=1, worker_init_fn=start)))
    assert next(loader) == 7  # the worker is up
    [worker] = loader._workers
    terminated_by_another(worker.pid)
    assert [next(loader), next(loader)] == [8, 9]
    time.sleep(0.1)
    assert worker.is_alive()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0


@outlives
def test_the_loaders_of_training_and_evaluation_have_such_workers(make_trainer, make_pairs):
    rows = datasets.Dataset.from_list([make_pairs()[index] for index in range(8)])
    sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "dataloader_num_workers": 1}
    for pairs in (make_pairs(), rows.to_iterable_dataset()):
        trainer = make_trainer(pairs, eval_dataset=make_pairs(), max_steps=1, **sizes)
        for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
            before = psutil.Process().children()
            batches = iter(loader)
            assert next(batches)["filenames"]
            [worker] = [child for child in psutil.Process().children() if child not in before]
            terminated_by_another(worker.pid)
            time.sleep(0.1)
            assert worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_torchrun_hands_sigterm_on_and_its_ranks_save_together(recipe, launched, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "kcfi_cli", "train", str(recipe), "--eval_strategy", "no", "--num_train_epochs", "200"]
    command += ["--save_strategy", "steps", "--save_steps", "4", "--report_to", "none"]
    process = subprocess.Popen(command, env={**launched, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"})
    while not complete_checkpoints(run):
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.1)
    process.terminate()
    assert process.wait() != 0  # torchrun's own, though its ranks end well
    last = step_of(complete_checkpoints(run)[-1])
    assert not (run / "error.txt").exists() and not (run / "error_rank1.txt").exists()
    steps = json.loads((run / f"checkpoint-{last}" / "trainer_state.json").read_text())["global_step"]
    assert steps == last and not is_complete(run)


def test_a_run_killed_between_its_last_checkpoint_and_its_end_takes_no_further_step(recipe, tmp_path):
    """Failed before: where the last step lay within an epoch, a resumed run took one more."""
    options = [
        str(recipe),
        "--max_steps",
        "3",
        "--save_strategy",
        "steps",
        "--save_steps",
        "3",
        "--eval_strategy",
        "no",
    ]
    train.main(options)
    run = tmp_path / "run"
    before, log = (run / "model.safetensors").read_bytes(), log_of(run)
    for name in (MARKER, "model.safetensors", "trainer_state.json"):
        (run / name).unlink()
    train.main([*options, "--resume"])
    assert step_of(run) == 3 and log_of(run) == log
    assert (run / "model.safetensors").read_bytes() == before
