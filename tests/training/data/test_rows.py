"""Data sets that `datasets` opens in other ways than as shards: examples, order, ranks, resume, evaluation."""

import csv
import io
import json
import tarfile
from itertools import islice

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node

from kcfi.training.collator import KCFICollator
from kcfi.training.data.check import check_folder
from kcfi.training.data.pairs import UnreadablePairError
from kcfi.training.data.rows import Position, RowDataset, RowStream, open_pairs
from kcfi.training.data.shards import commit_of
from kcfi.training.load import load_pairs
from kcfi.training.trainer import KCFITrainer, stream_batch
from tests.training.data.test_shards import plain
from tests.training.data.visits import Visits
from tests.training.test_trainer import arguments, losses

FOLDERS = {"image_before": "A", "image_after": "B", "mask": "label"}
WEBDATASET = {
    "image_before": "before.png",
    "image_after": "after.png",
    "mask": "mask.png",
    "captions": "json.captions",
    "changed": "json.changed",
    "filename": "json.filename",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    """A folder without the cache beside its files: `datasets` takes a lock with "test" in its name for a split."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def save(folder, kind, pairs, split="train"):
    """Write pairs as people do."""
    rows = []
    for pair in pairs:
        row = {"captions": pair["captions"], "changed": pair["changed"], "filename": pair["filename"]}
        for key, name in FOLDERS.items():
            path = folder / split / name / pair["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            pair[key].save(path)
            row[f"{key}_file_name" if kind in ("jsonl", "csv") else key] = f"{name}/{pair['filename']}"
        rows.append(row)
    if kind == "webdataset":
        for number in range(0, len(rows), 2):
            with tarfile.open(folder / f"{split}-{number // 2:05d}.tar", "w") as shard:
                for row in rows[number : number + 2]:
                    parts = {f"{key.removeprefix('image_')}.png": folder / split / row.pop(key) for key in FOLDERS}
                    contents = {name: path.read_bytes() for name, path in parts.items()}
                    for ending, content in {**contents, "json": json.dumps(row).encode()}.items():
                        entry = tarfile.TarInfo(f"{row['filename'].removesuffix('.png')}.{ending}")
                        entry.size = len(content)
                        shard.addfile(entry, io.BytesIO(content))
        for path in (folder / split).rglob("*.png"):
            path.unlink()
    elif kind == "csv":
        with (folder / split / "metadata.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows({**row, "captions": row["captions"][0]} for row in rows)
    else:
        name = {"jsonl": "metadata.jsonl", "json": "pairs.jsonl"}[kind]
        (folder / split / name).write_text("\n".join(map(json.dumps, rows)))
        if kind == "json":  # a folder of images would be opened as one
            card = {
                "configs": [{"config_name": "default", "data_files": [{"split": split, "path": f"{split}/*.jsonl"}]}]
            }
            (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    return str(folder)


@pytest.fixture
def pairs(make_pairs):
    return [make_pairs(masks="all")[index] for index in range(8)]


@pytest.fixture
def rows(pairs):
    """The pairs as a `datasets.Dataset`, of which the last has no mask."""
    return datasets.Dataset.from_list([*pairs[:-1], {**pairs[-1], "mask": None}])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["webdataset", "jsonl", "csv", "json"])
def test_whatever_datasets_opens_gives_the_examples_of_a_folder(data, pairs, kind, streaming):
    """Failed before: "no LevirCCcaptions.json or LevirCCcaptions.json.gz in this folder"."""
    folder = save(data, kind, pairs)
    columns = WEBDATASET if kind == "webdataset" else {}
    found = load_pairs(folder, "train", 7, columns=columns, streaming=streaming)
    if streaming:
        found = RowDataset(*found.source)
    assert len(found) == 7
    for index, pair in enumerate(pairs[:7]):
        expected = {**pair, "captions": pair["captions"][:1]} if kind == "csv" else pair
        assert plain(found[index]) == plain(expected)
    problems, counts = check_folder(folder, columns)
    assert [problem for problem in problems if "captions; expected 5" not in problem] == []
    assert (counts["train"].pairs, counts["train"].masks) == (8, 8)


def test_an_image_path_of_two_json_files_must_say_which_folder_it_is_in(data, pairs):
    for name in ("one", "two"):
        save(data / name, "json", pairs[:1])
    card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*/train/*.jsonl"}]}]}
    (data / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    with pytest.raises(UnreadablePairError, match=r"A/pair_0.png is ambiguous: .*one/train/A.* and .*two/train/A"):
        load_pairs(str(data), "train")[0]
    for path in (data / "one" / "train" / "A").iterdir():
        path.unlink()
    for name in ("B", "label"):
        (data / "two" / "train" / name / "pair_0.png").unlink()
    assert plain(load_pairs(str(data), "train")[0]) == plain(pairs[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_and_a_missing_image_are_named(data, pairs, streaming):
    folder = save(data, "json", pairs[:2])
    (data / "train" / "A" / "pair_0.png").write_bytes(b"no image")
    found = load_pairs(folder, "train", streaming=streaming)
    with pytest.raises(UnreadablePairError, match=r"pair_0\.png \(image_before\): cannot be read as an image"):
        next(iter(found))
    (data / "train" / "A" / "pair_0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"pair_0\.png \(image_before\): no such file"):
        next(iter(found))


def test_columns_that_do_not_fit_are_refused_by_name(data, pairs, rows):
    with pytest.raises(ValueError, match=r"there must be one for each of image_before.*Say which in `columns`"):
        load_pairs(save(data, "webdataset", pairs), "train")
    for other in (rows, rows.to_iterable_dataset()):
        with pytest.raises(ValueError, match="its columns are A,"):
            RowDataset(other.rename_column("image_before", "A"))
    with pytest.raises(ValueError, match=r"captions is a column of Value\('bool'\)"):
        RowDataset(rows.remove_columns("captions").rename_column("changed", "captions").add_column("changed", [1] * 8))


def test_settings_of_what_datasets_opens_are_refused_elsewhere(root):
    for name in ("synthetic", str(root)):
        with pytest.raises(ValueError, match="streaming is for what `datasets` opens"):
            load_pairs(name, "train", streaming=True)
        with pytest.raises(ValueError, match="dataset_revision v1 is for a data set on the Hub"):
            load_pairs(name, "train", revision="v1")
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing: neither a folder nor .* on the Hub at revision v1"):
        load_pairs("nobody/nothing", "train", revision="v1")


def test_the_commit_of_a_data_set_is_that_of_its_files():
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert commit_of([f"hf://datasets/me/pairs@{commit}/data/train-0.parquet"]) == commit
    assert commit_of(["/data/pairs@home/train.tar"]) is None


def numbers(stream, count):
    """Pass and number of the first pairs of a stream."""
    return [(example["epoch"], int(example["filename"][5:-4])) for example in islice(stream, count)]


@pytest.mark.parametrize("shards", [1, 2, 4])  # each rank has every second row, one shard, two shards
def test_ranks_share_out_every_pass(rows, shards):
    streams = [RowStream(rows.to_iterable_dataset(num_shards=shards).shuffle(seed=0, buffer_size=3)) for _ in range(2)]
    for rank, stream in enumerate(streams):
        stream.rank, stream.ranks = rank, 2
    visited = [numbers(stream, 12) for stream in streams]
    for epoch in range(3):
        parts = [[number for passed, number in rank if passed == epoch] for rank in visited]
        assert sorted(parts[0] + parts[1]) == list(range(8)) and len(parts[0]) == 4
    order = [number for _, number in visited[0]]
    assert order[:4] != order[4:8]


def test_a_stream_that_was_shared_out_by_hand_is_not_shared_out_again(rows):
    stream = RowStream(split_dataset_by_node(rows.to_iterable_dataset(num_shards=2), 1, 2))
    stream.rank, stream.ranks = 1, 2
    assert numbers(stream, 4) == [(0, 4), (0, 5), (0, 6), (0, 7)]
    with pytest.raises(ValueError, match="give the whole evaluation data"):
        RowDataset(stream.rows)


def test_a_stream_that_does_not_know_its_types_is_read_as_it_is(pairs):
    stream = datasets.IterableDataset.from_generator(lambda: iter(pairs))
    assert stream.features is None
    example = next(iter(RowStream(stream)))
    assert plain({key: example[key] for key in pairs[0]}) == plain(pairs[0])
    with pytest.raises(ValueError, match="the stream has no pair"):
        RowStream(datasets.IterableDataset.from_generator(lambda: iter([])))


def test_a_stream_is_not_decoded_where_it_was_trained_on(rows, processor):
    broken = rows.cast_column("image_before", datasets.Image(decode=False)).map(
        lambda row: {"image_before": {"bytes": b"no image", "path": None}} if row["filename"] < "pair_3" else {}
    )
    stream = RowStream(broken.to_iterable_dataset())
    stream.positions = {0: Position(10, 1, 3, "pair_2.png")}
    examples = iter(stream)
    assert [next(examples) for _ in range(10)] == [None] * 10
    assert stream_batch(None, [None, None]) == {}
    assert [next(examples)["filename"] for _ in range(5)] == [f"pair_{number}.png" for number in range(3, 8)]


def visits(folder, model, processor, data, resume=0, **settings):
    """Train on data as `load_dataset` returns it, with a collator whose draws depend on the pass."""
    args = {"max_steps": 9, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3, **settings}
    trainer = Visits(
        model,
        arguments(folder / "run", **args),
        KCFICollator(processor, captions_per_pair=1, augment=True),
        train_dataset=data,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{resume}") if resume else None)
    return trainer


@pytest.fixture
def weights(model):
    """Loads the same weights into the model; every run begins with them."""
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    return lambda: model.load_state_dict(state) and model


@pytest.mark.parametrize(("workers", "stop"), [(0, 3), (0, 6), (2, 3)])  # in the first pass, in the second
def test_streamed_data_trains_and_a_resumed_run_goes_on_exactly(tmp_path, weights, processor, rows, workers, stop):
    """Failed before: AttributeError: 'KCFITrainer' object has no attribute 'sampler'."""
    data = rows.to_iterable_dataset(num_shards=3).shuffle(seed=0, buffer_size=4)
    full = visits(tmp_path, weights(), processor, data, dataloader_num_workers=workers)
    if not workers:
        assert sorted(full.visited[:8]) == sorted(full.visited[8:16]) == [f"pair_{number}.png" for number in range(8)]
        assert full.visited[:8] != full.visited[8:16]
    resumed = visits(tmp_path, weights(), processor, data, resume=stop, dataloader_num_workers=workers)
    assert resumed.visited == full.visited[2 * stop :]
    assert [(line["loss"], line["epoch"]) for line in losses(resumed)] == [
        (line["loss"], line["epoch"]) for line in losses(full)
    ]


def test_more_workers_than_shards_leave_some_idle(tmp_path, weights, processor, rows):
    data = rows.to_iterable_dataset(num_shards=1)
    full = visits(tmp_path, weights(), processor, data, dataloader_num_workers=2)
    assert full.visited == [f"pair_{number % 8}.png" for number in range(18)]
    resumed = visits(tmp_path, weights(), processor, data, resume=6, dataloader_num_workers=2)
    assert resumed.visited == full.visited[12:]


def test_a_stream_in_another_order_is_not_resumed(tmp_path, weights, processor, rows):
    data = rows.to_iterable_dataset()
    visits(tmp_path, weights(), processor, data)
    for other in (data.shuffle(seed=1, buffer_size=8), data.take(4)):
        with pytest.raises(ValueError, match=r"pair 6 of pass 0 is .*, but was pair_5\.png in the run to resume"):
            visits(tmp_path, weights(), processor, other, resume=3)


def test_a_run_of_data_that_did_not_stream_is_not_resumed_on_a_stream(tmp_path, weights, processor, rows):
    visits(tmp_path, weights(), processor, rows, max_steps=3)
    with pytest.raises(ValueError, match="checkpoint-3 was written by a run whose data did not stream"):
        visits(tmp_path, weights(), processor, rows.to_iterable_dataset(), resume=3)


def test_a_plain_dataset_trains_in_the_order_of_a_folder(tmp_path, weights, processor, rows, make_pairs):
    runs = [
        visits(tmp_path, weights(), processor, data, max_steps=4, save_strategy="no") for data in (rows, make_pairs())
    ]
    assert runs[0].visited == runs[1].visited


def test_streamed_and_plain_data_are_evaluated_alike(tmp_path, model, processor, rows, monkeypatch):
    """Failed before: AttributeError: 'IterableColumn' object has no attribute 'height'."""
    monkeypatch.setenv("PATH", "")  # without Java
    stream = rows.to_iterable_dataset(num_shards=2)
    scores = []
    for data in (rows, stream, {"here": stream}):
        trainer = KCFITrainer(
            model,
            arguments(tmp_path, generation_max_new_tokens=4),
            KCFICollator(processor),
            eval_dataset=data,
            processing_class=processor,
        )
        found = trainer.evaluate()
        scores.append({name.replace("eval_here", "eval"): value for name, value in found.items()})
    keep = [name for name in scores[0] if "runtime" not in name and "second" not in name and "memory" not in name]
    assert scores[0]["eval_mask_f1"] >= 0 and len(keep) > 8
    for other in scores[1:]:
        assert [other[name] for name in keep] == [scores[0][name] for name in keep]
    assert trainer.evaluate(stream, metric_key_prefix="eval")["eval_loss"] == scores[0]["eval_loss"]


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "max_steps=-1: a streamed train_dataset has no length"),
        ({"max_steps": 1, "max_unreadable": 0.1}, r"max_unreadable=0\.1 needs the length"),
        ({"max_steps": 1, "dwa": "epoch"}, "dwa=epoch needs the length"),
    ],
)
def test_settings_that_a_stream_cannot_have_are_refused(tmp_path, model, processor, rows, settings, message):
    data = rows.to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        KCFITrainer(model, arguments(tmp_path, **settings), KCFICollator(processor), train_dataset=data)
    with pytest.raises(ValueError, match="train_dataset is a Endless, whose order cannot be shared out"):
        KCFITrainer(model, arguments(tmp_path, max_steps=1), KCFICollator(processor), train_dataset=Endless())


def test_an_epoch_of_a_stream_is_warned_of(tmp_path, model, processor, rows, caplog):
    args = arguments(tmp_path, max_steps=1, save_strategy="epoch")
    KCFITrainer(model, args, KCFICollator(processor), train_dataset=rows.to_iterable_dataset())
    assert "save_strategy=epoch means at the end" in caplog.text


def test_shards_are_streamed_on_request_alone(data, rows):
    rows.to_parquet(data / "train.parquet")
    assert type(open_pairs(str(data), "train")).__name__ == "ShardDataset"
    stream = load_pairs(str(data), "train", streaming=True)
    assert isinstance(stream, RowStream)
    shuffled = numbers(stream.shuffled(3), 8)
    assert sorted(shuffled) == numbers(stream, 8) != shuffled
