"""Which pairs a run visits, in which order: on one or two ranks, with or without loader workers, resumed or not."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest

from kcfi.training.data import shards
from kcfi.training.data.levir_cc import LevirCCDataset
from kcfi.training.data.order import EpochSampler, epoch_order, share_out
from kcfi.training.data.pairs import UnreadablePairError
from kcfi.training.data.shards import ShardDataset, write_shards
from tests.training.data.visits import BATCH, PAIRS, STOP, visits
from tests.training.test_trainer import losses


@pytest.fixture
def folder(tmp_path, make_pairs, model, processor, monkeypatch):
    """A model, its processor, and `PAIRS` pairs in shards of 4."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "PAIRS_PER_SHARD", 4)
    entries = []
    for index, pair in enumerate(make_pairs()[number] for number in range(PAIRS)):
        sentences = [{"raw": caption} for caption in pair["captions"]]
        entry = {"filename": pair["filename"], "split": "train", "changeflag": index % 2, "sentences": sentences}
        entries.append(entry)
        for name, key in (("A", "image_before"), ("B", "image_after"), ("label", "mask")):
            path = tmp_path / "pairs" / "images" / "train" / name / pair["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            pair[key].save(path)
    (tmp_path / "pairs" / "LevirCCcaptions.json").write_text(json.dumps({"images": entries}))
    write_shards(tmp_path / "pairs", tmp_path / "shards")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path


def test_an_order_is_a_permutation_of_shards_and_of_the_rows_in_each():
    sizes = [3, 5, 1, 4]
    shard_of = np.repeat(np.arange(4), sizes)
    orders = [epoch_order(sizes, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert sorted(order) == list(range(13))
        assert (np.diff(shard_of[order]) != 0).sum() == 3  # every shard is left once
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(dict.fromkeys(shard_of[order])) for order in orders}) > 1
    assert (epoch_order(sizes, 0, 1) == orders[1]).all()


def test_pairs_without_shards_have_the_order_of_one_permutation():
    assert (epoch_order([9], 5, 2) == np.random.default_rng([5, 2]).permutation(9)).all()


def test_each_lane_has_a_stretch_of_its_own():
    shared = share_out(np.arange(29), lanes=3, batch_size=2)
    assert sorted(shared) == list(range(29))
    batches = shared[:24].reshape(-1, 2)
    for lane in range(3):
        assert batches[lane::3].ravel().tolist() == list(range(8 * lane, 8 * lane + 8))
    assert shared[24:].tolist() == [24, 25, 26, 27, 28]
    assert share_out(np.arange(5), lanes=3, batch_size=2).tolist() == [0, 1, 2, 3, 4]


def test_a_resumed_sampler_needs_nothing_but_the_epoch():
    sampler = EpochSampler([4, 4], seed=3, lanes=2, batch_size=2)
    first = list(sampler)
    sampler.epoch = 1
    second = list(sampler)
    assert first != second and sorted(first) == sorted(second) == list(range(8))
    fresh = EpochSampler([4, 4], seed=3, lanes=2, batch_size=2)
    fresh.epoch = 1
    assert list(fresh) == second


class Counted(ShardDataset):
    """Notes which pairs are decoded."""

    def __init__(self, *args):
        super().__init__(*args)
        self.decoded = []

    def __getitem__(self, index):
        self.decoded.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("stop", [STOP, 11, 14])  # in the first epoch, between two, in the second
def test_a_resumed_run_visits_the_rest_and_decodes_nothing_else(folder, stop):
    pairs, again = (Counted(str(folder / "shards"), "train") for _ in range(2))
    full = visits(folder, pairs, save_steps=stop)
    epochs = full.visited[:PAIRS], full.visited[PAIRS:]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"pair_{index}.png" for index in range(PAIRS))
    assert epochs[0] != epochs[1]

    resumed = visits(folder, again, resume=stop)
    assert resumed.visited == full.visited[BATCH * stop :]
    assert again.decoded == pairs.decoded[BATCH * stop :]
    assert [line["loss"] for line in losses(resumed)] == [line["loss"] for line in losses(full)]


@pytest.fixture
def broken(folder):
    """The folder with one image cut short and one empty mask, and shards of these files."""
    images = folder / "pairs" / "images" / "train"
    (images / "B" / "pair_3.png").write_bytes((images / "B" / "pair_3.png").read_bytes()[:60])
    (images / "label" / "pair_8.png").write_bytes(b"")
    write_shards(folder / "pairs", folder / "broken")
    return {
        "folder": LevirCCDataset(folder / "pairs", "train"),
        "shards": ShardDataset(str(folder / "broken"), "train"),
    }


@pytest.mark.parametrize(("source", "workers"), [("folder", 0), ("shards", 2)])
def test_other_pairs_stand_in_for_unreadable_ones_which_are_named_and_resumes_stay_exact(
    folder, broken, source, workers, caplog
):
    full = visits(folder, broken[source], save_steps=STOP, workers=workers, max_unreadable=0.1)
    readable = {f"pair_{index}.png" for index in range(PAIRS)} - {"pair_3.png", "pair_8.png"}
    for epoch in (full.visited[:PAIRS], full.visited[PAIRS:]):
        assert set(epoch) == readable and len(epoch) == PAIRS
    named = [record.getMessage() for record in caplog.records if "stands in" in record.getMessage()]
    for name in ("pair_3.png", "pair_8.png"):
        assert sum(name in message and "cannot be read as an image" in message for message in named) == 2  # epochs
    resumed = visits(folder, broken[source], resume=STOP, workers=workers, max_unreadable=0.1)
    assert resumed.visited == full.visited[BATCH * STOP :]
    assert [line["loss"] for line in losses(resumed)] == [line["loss"] for line in losses(full)]


@pytest.mark.parametrize("source", ["folder", "shards"])
def test_more_unreadable_pairs_than_allowed_stop_the_run(folder, broken, source):
    with pytest.raises(ValueError, match=r"2 of 22 training pairs could not be read .* max_unreadable=0\.09 allows"):
        visits(folder, broken[source], max_unreadable=0.09)
    with pytest.raises(UnreadablePairError, match=r"pair_[38]\.png.*: cannot be read as an image"):
        visits(folder, broken[source])


def test_without_any_readable_pair_the_first_is_named(folder, broken):
    for path in (folder / "pairs" / "images" / "train" / "A").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UnreadablePairError, match=r"A/pair_\d+\.png: cannot be read as an image"):
        visits(folder, broken["folder"], max_unreadable=0.9)


@pytest.mark.parametrize("other", ["processes", "workers", "batch", "accumulation"])
def test_a_run_is_not_resumed_within_an_epoch_with_what_would_change_its_order(folder, other):
    pairs = ShardDataset(str(folder / "shards"), "train")
    visits(folder, pairs, save_steps=STOP)
    state = folder / "run" / f"checkpoint-{STOP}" / "kcfi_state.json"
    saved = json.loads(state.read_text())
    assert saved["order"] == {"processes": 1, "workers": 0, "batch": BATCH, "accumulation": 1}
    saved["order"][other] = 3
    state.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=rf"written by a run with .*'{other}': 3.*this one has .*'{other}': [^3]"):
        visits(folder, pairs, resume=STOP)


def test_the_order_of_a_folder_does_not_depend_on_the_workers_it_is_resumed_with(folder):
    pairs = LevirCCDataset(folder / "pairs", "train")
    full = visits(folder, pairs, save_steps=STOP)
    resumed = visits(folder, pairs, resume=STOP, workers=2)
    assert resumed.visited == full.visited[BATCH * STOP :]
    assert [line["loss"] for line in losses(resumed)] == [line["loss"] for line in losses(full)]


def rates(trainer, epoch):
    """Learning rates of the steps of an epoch (1 = the first)."""
    return [line["learning_rate"] for line in losses(trainer) if epoch - 1 < line["epoch"] <= epoch]


@pytest.mark.parametrize("change", [{"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 3}], ids=str)
def test_between_two_epochs_a_run_goes_on_with_steps_of_another_size(folder, change):
    pairs, epoch = LevirCCDataset(folder / "pairs", "train"), PAIRS // BATCH
    full = visits(folder, pairs, save_steps=1, num_train_epochs=3)
    other = visits(folder, pairs, num_train_epochs=3, **change)
    steps = len(rates(other, 1))
    resumed = visits(folder, pairs, resume=epoch, save_steps=1, num_train_epochs=3, **change)
    assert resumed.visited == full.visited[PAIRS:]
    assert rates(resumed, 1) == rates(full, 1) and rates(resumed, 3) == rates(other, 3)
    assert resumed.state.epoch == 3 and resumed.state.global_step == epoch + 2 * steps

    again = visits(folder, pairs, resume=epoch + steps + 1, num_train_epochs=3, **change)  # within the last epoch
    pairs_of_a_step = 4 if "per_device_train_batch_size" in change else 3 * BATCH
    assert again.visited == resumed.visited[PAIRS + pairs_of_a_step :]
    assert [line["loss"] for line in losses(again)] == [line["loss"] for line in losses(resumed)]


def run_ranks(folder, ranks, kind):
    """visits.py under torchrun: what each rank visited, by the number of loader workers."""
    script = Path(__file__).with_name("visits.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parents[3]), "OMP_NUM_THREADS": "1"}
    environment["HF_DATASETS_CACHE"] = str(folder / "cache")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*command, str(script), str(folder), kind], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        workers: [json.loads((folder / f"visits_{rank}_{workers}.json").read_text()) for rank in range(ranks)]
        for workers in (0, 2)
    }


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_and_workers_visit_every_pair_once_and_resume_exactly(folder, ranks):
    steps = -(-PAIRS // (ranks * BATCH))  # of an epoch; on two ranks the last batch has two pairs too few
    for workers, runs in run_ranks(folder, ranks, "shards").items():
        order = [runs[0]["names"][index] for index in EpochSampler([4] * 5 + [2], 42, ranks * max(1, workers), BATCH)]
        assert sorted(order) == sorted(f"pair_{index}.png" for index in range(PAIRS))
        filled = order + order[: steps * ranks * BATCH - PAIRS]
        batches = np.array(filled).reshape(-1, BATCH)
        for rank, run in enumerate(runs):
            assert run["full"][: steps * BATCH] == batches[rank::ranks].ravel().tolist()
            assert len(run["full"]) == 2 * steps * BATCH
            assert run["resumed"] == run["full"][BATCH * STOP :]
    if ranks == 2:  # one rank takes over between two epochs
        alone = visits(folder, ShardDataset(str(folder / "shards"), "train"), resume=steps)
        assert sorted(alone.visited) == sorted(runs[0]["names"]) and alone.state.epoch == 2
        with pytest.raises(ValueError, match=r"with .*'processes': 2.*this one has .*'processes': 1"):
            visits(folder, ShardDataset(str(folder / "shards"), "train"), resume=STOP)


@pytest.mark.slow
def test_two_ranks_stream_apart_from_each_other_and_resume_exactly(folder):
    """Of 4 shards of 5 pairs each rank has 2: a pass is 5 steps of 2 pairs per rank."""
    for workers, runs in run_ranks(folder, 2, "stream").items():
        for run in runs:
            assert len(run["full"]) == 20 and run["resumed"] == run["full"][BATCH * STOP :]
        visited = [run["full"] for run in runs]
        assert set(Counter(visited[0] + visited[1]).values()) == {2}  # two passes
        if not workers:  # with them, the last batch of a worker's pass holds a pair of its next one
            assert set(Counter(visited[0][:10] + visited[1][:10]).values()) == {1}
