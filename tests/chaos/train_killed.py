"""Stops a real training at random moments, again and again, and compares it with the run that nobody stopped.

python -m tests.chaos.train_killed --kills 50                                     SIGKILL, one process
python -m tests.chaos.train_killed --kills 10 --processes 2 --deepspeed zero2     both ranks, a moment apart
python -m tests.chaos.train_killed --kills 10 --signal TERM                       what a scheduler sends

A run is `kcfi train` of a tiny model on a folder of pairs, with dropout, mirrored pairs and dynamic weights. By turns
a moment is drawn from the whole life of a process, its start and its end included, from its steps, and from one of
its saves. A stopped run goes on by `--resume`; once it is finished, the next one begins. Each life is a fork of this
process, which has imported everything.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: threads do not survive a fork

import torch
import torch._dynamo  # imported here, once, and not by the first optimizer step of every life
import yaml
from transformers import AutoModelForImageTextToText
from transformers.models.olmo2 import modeling_olmo2  # noqa: F401  likewise
from transformers.models.vit import modeling_vit  # noqa: F401

from kcfi.training import train
from kcfi.training.checkpoints import UNFINISHED, complete_checkpoints, step_of
from kcfi.training.trainer import KCFITrainer
from tests.training.conftest import VISION, Pairs, save_text_model

STEPS, SAVE_STEPS = 14, 2
PAIRS = 10  # 5 steps per epoch: runs stop within epochs and between them
TIMES = {"pairs_per_second", "captions_per_second", "peak_memory_mib"}  # of a line of the log: the rest is compared
RECIPE = {
    "vision_config": VISION,
    "model_settings": {"flow_residual": "cross"},
    "train_language_model": True,  # which has dropout
    "augment": True,
    "captions_per_pair": 2,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": SAVE_STEPS,
    "save_total_limit": 2,
    "logging_steps": 3,  # unlike the checkpoints
    "disable_tqdm": True,
    "report_to": ["none"],
    "use_cpu": True,
}


def save_pairs(folder, count):
    """Write `Pairs` as LEVIR-MCI is distributed: reading them takes less time than drawing them in every life."""
    entries = []
    for pair in (Pairs(count)[index] for index in range(count)):
        sentences = [{"raw": caption, "tokens": caption.split()} for caption in pair["captions"]]
        entries.append({"filename": pair["filename"], "split": "train", "sentences": sentences})
        entries[-1]["changeflag"] = int(pair["changed"])
        for name, image in (("A", "image_before"), ("B", "image_after"), ("label", "mask")):
            file = folder / "images" / "train" / name / pair["filename"]
            file.parent.mkdir(parents=True, exist_ok=True)
            pair[image].save(file)
    (folder / "LevirCCcaptions.json").write_text(json.dumps({"images": entries, "dataset": "LEVIR-CC"}))


class Witness(KCFITrainer):
    """Writes a line per start and per optimizer step of every rank; a line that is written survives a kill."""

    journal: Path

    def train(self, *args, **kwargs):
        checkpoint = kwargs.get("resume_from_checkpoint")
        self.write({"resumed": step_of(Path(checkpoint)) if checkpoint else 0})
        return super().train(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        losses = {task: loss.item().hex() for task, loss in self.numbers.losses.items()}
        self.write({"step": self.state.global_step, "pairs": self.numbers.files, "losses": losses})
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def write(self, line):
        file = self.journal.with_name(f"journal{self.args.process_index}.jsonl")
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def lineage(journal):
    """The steps that led to the state of a run, by number: of two lines about a step the one after the last resume."""
    steps = {}
    for line in map(json.loads, journal.read_text(encoding="utf-8").splitlines()):
        if "resumed" in line:
            steps = {step: seen for step, seen in steps.items() if step <= line["resumed"]}
        else:
            steps[line["step"]] = line
    return steps


def result(run):
    """What must be equal of two runs: the weights, and the log without what was measured."""
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    log = [{name: line[name] for name in line.keys() - TIMES} for line in state["log_history"] if "loss" in line]
    return sha256((run / "model.safetensors").read_bytes()).hexdigest(), log


def changed(path, since):
    """Whether a file or a folder is there and has changed after a time, in ns: earlier lives have left some."""
    try:
        return path.stat().st_mtime_ns > since
    except FileNotFoundError:
        return False


def listened(journals, born):
    """Whether a life has done a step, on any rank: from then on SIGTERM may not end it otherwise than with code 0."""
    lines = [file.read_text(encoding="utf-8").splitlines()[-1] for file in journals if changed(file, born)]
    return any("step" in json.loads(line) for line in lines)


@dataclass
class Chaos:
    """The runs in a folder, and what was seen of them.

    Args:
        folder: for everything.
        processes, deepspeed, workers: of each run.
    """

    folder: Path
    processes: int = 1
    deepspeed: str | None = None
    workers: int = 0
    lost: list[int] = field(default_factory=list)  # optimizer steps, per stop
    saving: int = 0  # stops that left a checkpoint half written
    early: int = 0  # stops before there was a checkpoint: the run began anew
    loaded: int = 0  # checkpoints that were found, and loaded
    finished: int = 0  # runs, equal to the one that nobody stopped
    pairs: int = 0  # visits that finished runs should have made
    lost_pairs: int = 0
    repeated: int = 0

    def __post_init__(self):
        values = {**RECIPE, "dataset": str(self.folder / "pairs"), "text_model": str(self.folder / "text")}
        values["dataloader_num_workers"] = self.workers
        if self.deepspeed:
            values["deepspeed"] = self.deepspeed
        save_pairs(self.folder / "pairs", PAIRS)
        save_text_model(self.folder / "text", attention_dropout=0.1)
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        start = time.monotonic()
        self.full = self.folder / "full"
        ranks = self.start(self.full)
        while not (self.full / "journal0.jsonl").exists() and self.running(ranks):
            time.sleep(0.01)
        self.until_start = time.monotonic() - start
        self.wait(ranks, self.full)
        self.seconds = time.monotonic() - start
        self.steps = [lineage(self.full / f"journal{rank}.jsonl") for rank in range(self.processes)]
        self.result = result(self.full)

    def start(self, run):
        """Fork the ranks of a training, from its newest checkpoint if there is one."""
        run.mkdir(exist_ok=True)
        resume = ["--resume"] if complete_checkpoints(run) else []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        sys.stdout.flush()
        ranks = {}
        for rank in range(self.processes):
            ranks[rank] = os.fork()
            os.setpgid(
                ranks[rank], ranks[rank]
            )  # in both: a group of its own, so that loader workers go with their rank
            if not ranks[rank]:
                self.live(run, rank, port, resume)
        return ranks

    def live(self, run, rank, port, resume):
        """What a fork does: train, and end without what its parent would do."""
        log = os.open(run / f"log{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if self.processes > 1 or self.deepspeed:
            names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
            values = [rank, rank, self.processes, self.processes, "127.0.0.1", port]
            os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})
        Witness.journal = run / "journal"
        train.KCFITrainer = Witness
        code = 1
        try:
            train.main([str(self.folder / "recipe.yaml"), "--output_dir", str(run), *resume])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def running(self, ranks):
        """The ranks that have not ended."""
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return [pid for pid in ranks.values() if os.waitid(os.P_PID, pid, look) is None]

    def wait(self, ranks, run, code=0):
        """Wait for the end of all ranks, each with that exit code."""
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks.values()]
        assert all(found == code for found in codes), f"{codes}: {(run / 'log0.txt').read_text()[-3000:]}"

    def stop(self, run, moments, number, by=signal.SIGKILL):
        """Let a run live until a random moment, stop it, and look at what it left; false if it was finished before."""
        before = complete_checkpoints(run)
        step = step_of(before[-1]) if before else 0
        training = (self.seconds - self.until_start) * (1 - step / STEPS)
        born, journal = time.time_ns(), run / "journal0.jsonl"
        ranks = self.start(run)
        moment = moments.uniform(0, self.until_start + training)
        if number % 3 == 1 or (by == signal.SIGTERM and len(ranks) > 1):  # ranks that have not started do not listen
            self.until(ranks, lambda: changed(journal, born))
            moment = moments.uniform(0, training)
        elif number % 3 == 2:
            saved = step + SAVE_STEPS * moments.randint(1, 3)
            self.until(ranks, lambda: changed(journal, born) and max(lineage(journal), default=0) >= saved)
            now = time.time_ns()
            self.until(ranks, lambda: changed(run / UNFINISHED, now))
            moment = moments.choice([0, moments.uniform(0, 0.05)])
        begin = time.monotonic()
        self.until(ranks, lambda: time.monotonic() > begin + moment)
        if not self.running(ranks):
            self.wait(ranks, run)
            return False
        order = moments.sample(sorted(ranks.values()), len(ranks))
        for pid in order:
            os.killpg(pid, by)
            time.sleep(moments.uniform(0, 0.05) if pid != order[-1] else 0)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks.values()]
        self.look(run, codes, by, born)
        print(f"{len(self.lost)}: {run.name}, {self.lost[-1]} steps lost", flush=True)
        return True

    def until(self, ranks, condition):
        """Wait for a condition, or the end of a rank."""
        while not condition() and len(self.running(ranks)) == len(ranks):
            time.sleep(0.0005)

    def look(self, run, codes, by, born):
        """After a stop: is the newest checkpoint whole, and near enough?"""
        self.saving += changed(run / UNFINISHED, born)
        journals = [run / f"journal{rank}.jsonl" for rank in range(self.processes)]
        done = max((max(lineage(file), default=0) for file in journals if file.exists()), default=0)
        found = complete_checkpoints(run)
        self.early += not found
        newest = step_of(found[-1]) if found else 0
        self.lost.append(done - newest)
        if by == signal.SIGTERM:
            allowed = [{0}] if listened(journals, born) and done < STEPS else [{0}, {-by}]
            assert set(codes) in allowed, f"{codes}: {(run / 'log0.txt').read_text()[-3000:]}"
        most = 0 if by == signal.SIGTERM else SAVE_STEPS
        assert self.lost[-1] <= most, f"{run}: {done} steps were done, the checkpoint is of {newest}"
        if found:
            self.load(found[-1], run)

    def load(self, checkpoint, run):
        """Open all that a checkpoint holds, in a fork."""
        pid = os.fork()
        if not pid:
            code = 1
            try:
                AutoModelForImageTextToText.from_pretrained(checkpoint)
                for file in [*checkpoint.glob("*.pt"), *checkpoint.glob("*/*.pt")]:
                    torch.load(file, weights_only=False, map_location="cpu")
                code = 0
            except BaseException:
                (run / "log0.txt").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        self.wait({0: pid}, run)
        self.loaded += 1

    def compare(self, run):
        """A finished run is the one that nobody stopped: pairs, losses, log and weights."""
        for rank, steps in enumerate(self.steps):
            seen = lineage(run / f"journal{rank}.jsonl")
            full, visited = (Counter(pair for line in of.values() for pair in line["pairs"]) for of in (steps, seen))
            self.pairs += full.total()
            self.lost_pairs += (full - visited).total()
            self.repeated += (visited - full).total()
            other = {step: (line, steps.get(step)) for step, line in seen.items() if line != steps.get(step)}
            assert seen == steps, f"{run}: rank {rank} saw other pairs or losses, {len(seen)} steps: {other}"
            for line in map(json.loads, (run / f"journal{rank}.jsonl").read_text().splitlines()):
                assert "resumed" in line or line == steps[line["step"]], f"{run}: step {line['step']} differs"
        assert result(run) == self.result, f"{run}: another log, or other weights"
        self.finished += 1

    def go(self, kills, seed=0, by=signal.SIGKILL):
        """Stop runs so many times; the last one is let live to its end."""
        moments, number = random.Random(seed), 0
        run = self.folder / "run0"
        while len(self.lost) < kills:
            number += 1
            if not self.stop(run, moments, number, by):
                self.end(run)
                run = self.folder / f"run{self.finished}"
        self.wait(self.start(run), run)
        self.end(run)

    def end(self, run):
        """Compare a finished run, and make room."""
        self.compare(run)
        shutil.rmtree(run)

    def summary(self):
        """What was seen, as text."""
        stops, found = len(self.lost), len(self.lost) - self.early
        return (
            f"{stops} stops, {self.saving} of them within a save; a run without: {self.seconds:.1f} s, {STEPS} steps\n"
            f"{self.loaded} of {found} newest checkpoints load; {self.early} stops came before the first\n"
            f"steps lost per stop: {max(self.lost)} at most, save interval {SAVE_STEPS}; {sum(self.lost)} in all, "
            "computed again with the same pairs and losses\n"
            f"{self.finished} runs finished; of {self.pairs} visits of pairs lost {self.lost_pairs}, repeated "
            f"{self.repeated}; losses, log and final weights bit-identical"
        )


def main():
    """Run the harness; the first difference ends it with an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--deepspeed", help="zero2")
    parser.add_argument("--workers", type=int, default=0, help="loader workers")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder), options.processes, options.deepspeed, options.workers)
        chaos.go(options.kills, options.seed, signal.Signals[f"SIG{options.signal}"])
        print(chaos.summary())


if __name__ == "__main__":
    main()
