import json
import shutil

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from kcfi.processing import InputError
from kcfi.training import train
from kcfi.training.data import shards
from kcfi.training.data.shards import FEATURES, ShardDataset, write_shards
from kcfi.training.load import load_pairs


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def converted(root, tmp_path):
    write_shards(root, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def write(root, tmp_path):
    """Writes the two training pairs as one parquet file, whose columns a function may change."""

    def parquet(change=lambda rows: rows, features=FEATURES):
        folder = tmp_path / "other"
        folder.mkdir()
        rows = [
            {
                "image_before": (root / "images/train/A" / name).read_bytes(),
                "image_after": (root / "images/train/B" / name).read_bytes(),
                "mask": None,
                "captions": ["a house appears ."],
                "changed": True,
                "filename": name,
                "split": "train",
            }
            for name in ("a.png", "b.png")
        ]
        change(datasets.Dataset.from_list(rows, features=FEATURES)).to_parquet(folder / "train.parquet")
        return str(folder)

    return parquet


def plain(example):
    """An example with arrays and modes instead of images."""
    return {
        key: (value.mode, np.asarray(value).tolist()) if isinstance(value, Image.Image) else value
        for key, value in example.items()
    }


@pytest.mark.parametrize("masks", ["grey", "three equal channels", "none"])
def test_a_folder_and_its_shards_give_equal_examples(root, tmp_path, masks):
    for path in sorted((root / "images").glob("*/label/*")):
        if masks == "three equal channels":
            Image.open(path).convert("RGB").save(path)
        if masks == "none":
            path.unlink()
    if masks == "none":
        for folder in (root / "images").glob("*/label"):
            folder.rmdir()
    write_shards(root, tmp_path / "shards")
    for split, count in (("train", 2), ("val", 1)):
        expected = load_pairs(str(root), split)
        found = load_pairs(str(tmp_path / "shards"), split)
        assert len(found) == len(expected) == count
        for index in range(count):
            assert plain(found[index]) == plain(expected[index])
            assert (found[index]["mask"] is None) == (masks == "none")


def test_shards_hold_the_bytes_of_the_files_and_datasets_opens_them_by_the_card(root, converted, monkeypatch):
    monkeypatch.chdir(root / "images/train/A")  # where a file of the same name lies
    rows = datasets.load_dataset(str(converted), split="train")
    assert rows.features == FEATURES
    undecoded = rows.cast_column("image_after", datasets.Image(decode=False))
    for row in undecoded:
        assert row["image_after"]["bytes"] == (root / "images/train/B" / row["filename"]).read_bytes()
    assert datasets.load_dataset(str(converted)).keys() == {"train", "val"}
    _, header, text = (converted / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["configs"][0]["data_files"][1] == {"split": "val", "path": "data/val-*.parquet"}
    assert "| train | 2 | 1 | 1 | 10 | yes |" in text


def test_folders_of_one_name_are_not_mixed_up_by_the_cache(root, tmp_path):
    """`datasets` 5.2 tells folders that have a card apart by the card alone."""
    write_shards(root, tmp_path / "one/shards")
    Image.new("RGB", (8, 6), (7, 7, 7)).save(root / "images/train/A/a.png", compress_level=0)
    write_shards(root, tmp_path / "two/shards")
    for name, value in (("one", 10), ("two", 7)):
        folder = str(tmp_path / name / "shards")
        for example in (load_pairs(folder, "train")[0], datasets.load_dataset(folder, split="train")[0]):
            assert example["image_before"].getpixel((0, 0)) == (value,) * 3


@pytest.fixture
def several(root, tmp_path, monkeypatch):
    """Nine training and nine validation pairs in shards of four."""
    monkeypatch.setattr(shards, "PAIRS_PER_SHARD", 4)
    captions = root / "LevirCCcaptions.json"
    entries = []
    for split, source in (("train", "a.png"), ("val", "c.png")):
        for number in range(9):
            entries.append(
                json.loads(captions.read_text())["images"][0] | {"split": split, "filename": f"{number}.png"}
            )
            for folder in ("A", "B", "label"):
                path = root / "images" / split / folder
                (path / f"{number}.png").write_bytes((path / source).read_bytes())
    captions.write_text(json.dumps({"images": entries}))
    write_shards(root, tmp_path / "several")
    return tmp_path / "several"


def test_shards_of_the_training_split_are_shuffled_and_others_keep_their_order(several):
    names = sorted(path.name for path in (several / "data").iterdir())
    assert names == [f"{split}-0000{number}-of-00003.parquet" for split in ("train", "val") for number in range(3)]
    in_order = [f"{number}.png" for number in range(9)]
    assert [pair["filename"] for pair in load_pairs(str(several), "val")] == in_order
    trained = [pair["filename"] for pair in load_pairs(str(several), "train")]
    assert trained != in_order and sorted(trained) == in_order


@pytest.mark.parametrize(("num_pairs", "sizes"), [(None, [4, 4, 1]), (6, [4, 2, 0]), (99, [4, 4, 1])])
def test_the_first_pairs_of_several_shards(several, num_pairs, sizes):
    pairs = ShardDataset(str(several), "val", num_pairs=num_pairs)
    assert (pairs.sizes, len(pairs)) == (sizes, sum(sizes))
    assert [pair["filename"] for pair in pairs] == [f"{number}.png" for number in range(sum(sizes))]
    assert pairs[5]["filename"] == "5.png" and pairs[0]["filename"] == "0.png"
    with pytest.raises(IndexError, match=f"pair {sum(sizes)} of {sum(sizes)} pairs"):
        pairs[sum(sizes)]


def test_a_shard_is_read_when_a_pair_of_it_is_asked_for(several):
    pairs = ShardDataset(str(several), "val")
    file = several / "data/val-00001-of-00003.parquet"
    file.write_bytes(b"PAR1")
    assert pairs[3]["filename"] == "3.png" and pairs[8]["filename"] == "8.png"
    with pytest.raises(ValueError, match=r"val-00001-of-00003\.parquet: not readable as parquet"):
        pairs[4]


def test_the_card_of_a_data_set_names_the_files_of_its_splits(several):
    """Of a folder here, of a Hub id elsewhere: `datasets` resolves both by the card."""
    files = shards.split_files(str(several), "val")
    assert files == [str(several / f"data/val-0000{number}-of-00003.parquet") for number in range(3)]
    with pytest.raises(ValueError, match="no split 'tset'; splits of the data set: train, val"):
        shards.split_files(str(several), "tset")


def test_the_splits_of_a_folder_are_those_of_the_same_files_on_the_hub(several, tmp_path):
    """`datasets` also reads folders that name their splits, where no card does."""
    for split in ("train", "test"):
        (tmp_path / "copy" / split).mkdir(parents=True)
        shutil.copy(several / "data/val-00002-of-00003.parquet", tmp_path / "copy" / split / "0000.parquet")
    for split in ("train", "test"):
        assert [pair["filename"] for pair in ShardDataset(str(tmp_path / "copy"), split)] == ["8.png"]


def test_a_conversion_that_fails_leaves_nothing_behind(root, tmp_path):
    (root / "images/val/B/c.png").unlink()
    (root / "images/val/B/d.png").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"val/B/c\.png"):
        write_shards(root, tmp_path / "shards")
    assert sorted(tmp_path.iterdir()) == before


def test_captions_that_are_refused_are_not_converted(root, tmp_path):
    captions = root / "LevirCCcaptions.json"
    content = json.loads(captions.read_text())
    for images, message in (([], "there is no pair"), ([{"filename": "a.png"}], r"images\[0\] is not as in")):
        captions.write_text(json.dumps({**content, "images": images}))
        with pytest.raises(ValueError, match=message):
            write_shards(root, tmp_path / "shards")


def test_a_folder_that_holds_anything_is_not_written_to(root, tmp_path):
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        write_shards(root, tmp_path)
    (tmp_path / "shards").mkdir()
    write_shards(root, tmp_path / "shards")
    assert (tmp_path / "shards/README.md").is_file()


def test_a_recipe_trains_from_shards(converted, text_model, vision, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    values = {
        "vision_config": vision,
        "text_model": str(text_model),
        "dataset": str(converted),
        "output_dir": str(tmp_path / "run"),
        "eval_strategy": "no",
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    recipe.write_text(yaml.safe_dump(values))
    train.main([str(recipe)])
    log = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    assert log[0]["loss"] > 0 and log[0]["mask_loss"] > 0


def test_columns_may_have_other_names(write):
    others = {"image_before": "A", "image_after": "B", "captions": "sentences", "changed": "changeflag"}

    def change(rows):
        rows = rows.cast_column("changed", datasets.Value("int64"))
        return rows.rename_columns(others).remove_columns(["mask", "split"])

    folder = write(change)
    example = load_pairs(folder, "train", columns=others)[1]
    assert example["image_after"].getpixel((0, 0)) == (101, 101, 101)
    assert (example["mask"], example["changed"], example["split"]) == (None, True, "train")
    assert example["captions"] == ["a house appears ."]
    with pytest.raises(ValueError, match=r"its columns are A, B, sentences, changeflag, filename, but.*`columns`"):
        load_pairs(folder, "train")
    with pytest.raises(ValueError, match="but there must be one for each of image_before"):
        load_pairs(folder, "train", columns={**others, "image_after": "A"})
    with pytest.raises(ValueError, match="'image_befor': did you mean 'image_before'"):
        load_pairs(folder, "train", columns={"image_befor": "A"})


@pytest.mark.parametrize("captions", ["absent", "null", "empty"])
def test_masks_without_sentences_and_flags_are_examples_whose_masks_tell_what_changed(write, root, captions):
    files = [str(root / "images/train/label" / name) for name in ("a.png", "b.png")]
    Image.new("L", (8, 6)).save(files[1])

    def change(rows):
        rows = rows.remove_columns(["mask", "captions", "changed"])
        rows = rows.add_column("mask", [{"path": file, "bytes": None} for file in files], feature=datasets.Image())
        if captions == "absent":
            return rows
        sentences = [None if captions == "null" else []] * 2
        return rows.add_column("captions", sentences, feature=FEATURES["captions"])

    pairs = load_pairs(write(change), "train")
    assert [(pair["captions"], pair["changed"]) for pair in (pairs[0], pairs[1])] == [([], True), ([], False)]


def test_sentences_and_flags_may_be_absent_only_where_there_are_masks(write):
    folder = write(lambda rows: rows.remove_columns(["mask", "captions", "changed"]))
    with pytest.raises(ValueError, match="one for each of image_before, image_after, captions, changed, filename"):
        load_pairs(folder, "train")


def test_a_pair_with_neither_a_flag_nor_a_mask_is_named(write):
    folder = write(lambda rows: rows.remove_columns("changed"))
    with pytest.raises(ValueError, match=r"a\.png: neither a flag nor a mask tells whether it changed"):
        load_pairs(folder, "train")[0]


def test_a_column_of_another_type_is_refused(write):
    folder = write(lambda rows: rows.remove_columns("captions").add_column("captions", [1, 2]))
    with pytest.raises(ValueError, match=r"captions is a column of Value\('int64'\); expected List"):
        load_pairs(folder, "train")


def test_a_flag_that_is_neither_true_nor_false_is_refused(write):
    folder = write(lambda rows: rows.remove_columns("changed").rename_column("split", "changed"))
    with pytest.raises(ValueError, match=r"a\.png: changed is 'train'; expected true or false"):
        load_pairs(folder, "train")[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no image", r"a\.png \(image_after\): cannot be read"), (None, r"a\.png \(image_after\): no image")],
)
def test_an_image_that_cannot_be_read_is_named_and_spares_the_others(write, content, message):
    def change(rows):
        rows = rows.cast_column("image_after", datasets.Image(decode=False))
        cells = [content and {"bytes": content, "path": None}, rows[1]["image_after"]]
        return rows.remove_columns("image_after").add_column("image_after", cells, feature=datasets.Image())

    pairs = ShardDataset(write(change), "train")
    with pytest.raises(ValueError, match=message):
        pairs[0]
    assert pairs[1]["filename"] == "b.png"


def test_a_truncated_image_and_one_of_another_size_are_named(write, root):
    path = root / "images/train/B/a.png"
    path.write_bytes(path.read_bytes()[:50])
    Image.new("RGB", (4, 4)).save(root / "images/train/B/b.png")
    pairs = ShardDataset(write(), "train")
    with pytest.raises(ValueError, match=r"a\.png \(image_after\): cannot be read as an image"):
        pairs[0]
    with pytest.raises(ValueError, match=r"b\.png \(image_after\): 4 x 4 pixels, but .*\(image_before\) has 8 x 6"):
        pairs[1]


def test_what_is_no_data_set_is_named(converted, tmp_path):
    with pytest.raises(FileNotFoundError, match="nobody/nothing: neither a folder nor a data set on the Hub"):
        load_pairs("nobody/nothing", "train")
    with pytest.raises(ValueError, match="no split 'tset'; splits of the data set: train, val"):
        load_pairs(str(converted), "tset")
    file = converted / "data/train-00000-of-00001.parquet"
    content = file.read_bytes()
    for broken in (b"PAR1", content[:-100], b"x" * len(content)):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="shards, split 'train': "):
            load_pairs(str(converted), "train")


def test_columns_are_refused_where_there_are_none(root):
    for dataset in ("synthetic", str(root)):
        with pytest.raises(ValueError, match="columns are for parquet shards and Hub ids"):
            load_pairs(dataset, "train", columns={"image_before": "A"})


def test_a_shard_that_promises_more_than_memory_holds_is_refused_from_its_footer(converted, monkeypatch):
    monkeypatch.setattr(shards, "MOST_BYTES", 500)
    with pytest.raises(InputError, match=r"0\.0 GiB, but it is read as a whole"):
        ShardDataset(str(converted), "train")


@pytest.mark.parametrize(("key", "value"), [("filename", None), ("captions", ["a", None])])
def test_a_pair_without_a_name_or_with_a_caption_that_is_none_is_refused(write, key, value):
    def change(rows):
        return rows.map(lambda row: {key: value})

    with pytest.raises(InputError, match="expected texts for filename and captions"):
        ShardDataset(write(change), "train")[0]


def test_a_device_is_no_image():
    with pytest.raises(FileNotFoundError, match=r"no such file \(/dev/zero\)"):
        shards.open_cell({"bytes": None, "path": "/dev/zero"}, "a.png")


@pytest.mark.parametrize(
    ("change", "captions"),
    [
        (lambda rows: rows, [["a house appears ."]] * 2),
        (
            lambda rows: rows.remove_columns("captions").add_column("captions", ["one .", "two ."]),
            [["one ."], ["two ."]],
        ),
        (lambda rows: rows.remove_columns(["captions", "changed"]), [None, None]),
    ],
)
def test_a_column_is_read_alone_as_the_examples_have_it(write, change, captions):
    pairs = ShardDataset(write(change), "train")
    assert pairs.column("captions") == captions and pairs.column("filename") == ["a.png", "b.png"]
    pairs.keep({1})
    assert pairs.column("captions") == captions[1:] and pairs.column("filename") == ["b.png"] and len(pairs) == 1
