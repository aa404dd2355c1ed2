import gzip
import json

import datasets
import numpy as np
import pytest
from PIL import Image

from kcfi.training.data.check import check_folder, counts_table
from kcfi.training.data.shards import FEATURES, write_shards


def edit_captions(root, edit):
    path = root / "LevirCCcaptions.json"
    content = json.loads(path.read_text())
    edit(content["images"])
    path.write_text(json.dumps(content))


def assert_they_begin_with(problems, expected):
    assert len(problems) == len(expected)
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start)


def test_a_folder_as_distributed_has_no_problems(root):
    problems, counts = check_folder(root)
    assert problems == [] and list(counts) == ["train", "val"]
    train = counts["train"]
    assert (train.pairs, train.changed, train.captions, train.masks) == (2, 1, 10, 2)
    mask = np.asarray(Image.open(root / "images/train/label/a.png"))
    assert train.pixels.tolist() == [2 * (mask == value).sum() for value in (0, 128, 255)]
    title, first, second = counts_table(counts).splitlines()
    names = ["split", "pairs", "changed", "unchanged", "captions", "without", "with", "mask"]
    assert title.split() == [*names, "background", "px", "road", "px", "building", "px"]
    assert first.split() == ["train", "2", "1", "1", "10", "0", "2", *map(str, train.pixels)]
    assert second.split()[:7] == ["val", "1", "1", "0", "5", "0", "1"] and len(title) == len(first) == len(second)


def test_pairs_whose_flag_and_mask_disagree_are_counted_and_no_problem(root):
    Image.new("L", (8, 6)).save(root / "images/val/label/c.png")  # changed, but empty
    problems, counts = check_folder(root)  # and b.png is unchanged, but not empty
    assert problems == [] and (counts["train"].disagreeing, counts["val"].disagreeing) == (1, 1)


def test_masks_of_levir_cd_and_of_three_channels_and_gzipped_captions_are_fine(root):
    Image.fromarray(np.tile(np.array([0, 255], np.uint8), (6, 4))).save(root / "images/val/label/c.png")
    path = root / "images/train/label/a.png"
    Image.open(path).convert("RGB").save(path)
    captions = root / "LevirCCcaptions.json"
    (root / "LevirCCcaptions.json.gz").write_bytes(gzip.compress(captions.read_bytes()))
    captions.unlink()
    problems, counts = check_folder(root)
    assert problems == [] and counts["val"].pixels.tolist() == [24, 0, 24]


def test_levir_cc_has_no_masks(root):
    for split in ("train", "val"):
        (root / "images" / split / "label").rename(root / f"{split}_label")
    problems, counts = check_folder(root)
    assert problems == [] and counts["train"].masks == counts["train"].disagreeing == 0


def test_every_problem_is_named_with_its_file(root):
    images = root / "images"
    (images / "train/A/a.png").unlink()
    (images / "train/label/b.png").unlink()
    (images / "train/B/b.png").write_text("no image")
    Image.new("RGB", (4, 4)).save(images / "val/B/c.png")
    Image.fromarray(np.full((5, 8), 7, np.uint8)).save(images / "val/label/c.png")
    Image.new("RGB", (8, 6)).save(images / "train/B/extra.png")
    (images / "val/B/.hidden").touch()
    (images / "test/A").mkdir(parents=True)

    def edit(entries):
        entries[0]["sentences"].pop()
        entries.append(entries[1])
        entries.append({"filename": "d.png", "split": "val", "sentences": []})
        entries.append({"filename": "e.png", "split": "val", "sentences": [{"raw": ""}], "changeflag": 0})

    edit_captions(root, edit)
    captions = root / "LevirCCcaptions.json"
    problems, counts = check_folder(root)
    expected = [
        f"{captions}: b.png occurs more than once",
        f"{captions}: images[4] is not as in LevirCCcaptions.json (KeyError('changeflag'))",
        f"{captions}: e.png has an empty sentence",
        f"{captions}: a.png has 4 captions; expected 5",
        f"{images}/test: no pair of split 'test' in LevirCCcaptions.json",
        f"{images}/train/B/extra.png: no pair of split 'train' in LevirCCcaptions.json has this file",
        f"{images}/train/A/a.png: No such file or directory",
        f"{images}/train/B/b.png: cannot be read as an image",
        f"{images}/train/label/b.png: No such file or directory",
        f"{images}/val/B/c.png: 4 x 4 pixels, but {images}/val/A/c.png has 8 x 6",
        f"{images}/val/label/c.png: 8 x 5 pixels, but {images}/val/A/c.png has 8 x 6",
        f"{images}/val/label/c.png: mask value 7 is unknown",
    ]
    assert_they_begin_with(problems, expected)
    assert (counts["train"].captions, counts["train"].masks, counts["val"].masks) == (9, 1, 0)


def test_pairs_without_a_sentence_are_counted_and_a_problem_only_without_a_mask(root):
    edit_captions(root, lambda entries: [entry.update(sentences=[]) for entry in entries[1:]])
    problems, counts = check_folder(root)
    assert problems == [] and (counts["train"].without_captions, counts["val"].without_captions) == (1, 1)
    assert counts_table(counts).splitlines()[1].split()[4:7] == ["5", "1", "2"]
    (root / "images/val/label").rename(root / "label")
    problems, _ = check_folder(root)
    assert problems == [f"{root}/LevirCCcaptions.json: c.png has neither a sentence nor a mask"]


def test_a_folder_of_masks_alone_and_its_shards_have_no_problems(root, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        (root / "images" / split).rename(root / split)
    (root / "LevirCCcaptions.json").unlink()
    Image.new("L", (8, 6)).save(root / "train/label/b.png")
    (root / "list").mkdir()
    write_shards(root, tmp_path / "shards")
    assert "| train | 2 | by the mask | by the mask | 0 | yes |" in (tmp_path / "shards/README.md").read_text()
    for folder in (root, tmp_path / "shards"):
        problems, counts = check_folder(folder)
        train = counts["train"]
        assert problems == []
        assert (train.pairs, train.changed, train.without_captions, train.disagreeing) == (2, 1, 2, 0)
    Image.new("RGB", (8, 6)).save(root / "val/B/extra.png")
    problems, _ = check_folder(root)
    assert problems == [f"{root}/val/B/extra.png: no pair of split 'val' in A has this file"]


def test_a_split_without_a_folder_is_one_problem_per_date(root):
    (root / "images/val").rename(root / "elsewhere")
    problems, counts = check_folder(root)
    assert problems == [
        f"{root}/images/val/{name}: no such folder; expected the images of split 'val'" for name in ("A", "B")
    ]
    assert counts["val"].pairs == 1


@pytest.fixture
def shards(root, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_shards(root, tmp_path / "shards")
    return tmp_path / "shards"


def test_shards_are_counted_like_their_folder(root, shards):
    expected, found = check_folder(root), check_folder(shards)
    assert found[0] == expected[0] == [] and counts_table(found[1]) == counts_table(expected[1])


def test_every_problem_of_shards_is_named(root, shards):
    images = {key: (root / "images/val" / key / "c.png").read_bytes() for key in ("A", "B", "label")}
    Image.fromarray(np.full((6, 8), 7, np.uint8)).save(root / "unknown.png")
    row = {
        "image_before": images["A"],
        "image_after": images["B"],
        "mask": None,
        "captions": ["a"] * 5,
        "changed": True,
        "filename": "c.png",
        "split": "train",
    }
    more = [
        {"mask": (root / "unknown.png").read_bytes()},
        {"filename": "d.png", "image_after": images["B"][:50], "captions": ["a"] * 4},
        {"filename": "e.png", "image_after": None, "mask": images["label"]},
    ]
    rows = datasets.Dataset.from_list([row, *({**row, **change} for change in more)], features=FEATURES)
    rows.to_parquet(shards / "data/train-more.parquet")
    (shards / "data/train-damaged.parquet").write_bytes(b"PAR1")
    problems, counts = check_folder(shards)
    expected = [
        f"{shards}, split 'train': {shards}/data/train-damaged.parquet is not readable as parquet",
        f"{shards}: c.png occurs more than once in split 'train'",
        f"{shards}: c.png (mask): mask value 7 is unknown",
        f"{shards}: d.png has 4 captions; expected 5",
        f"{shards}: d.png (image_after): cannot be read as an image",
        f"{shards}: e.png (image_after): no image",
    ]
    assert_they_begin_with(problems, expected)
    assert (counts["train"].pairs, counts["train"].masks, counts["val"].pairs) == (2 + 4, 2 + 1, 1)


def test_shards_with_other_column_names_are_checked_by_them(shards):
    for path in (shards / "data").iterdir():
        datasets.Dataset.from_parquet(str(path)).rename_column("image_before", "A").to_parquet(path)
    problems, _ = check_folder(shards)
    assert len(problems) == 2  # a shard per split
    assert all("its columns are " in problem and "Say which in `columns`" in problem for problem in problems)
    assert check_folder(shards, {"image_before": "A"})[0] == []


def test_columns_of_a_folder_without_rows_are_refused(root):
    with pytest.raises(ValueError, match="columns are for what `datasets` opens"):
        check_folder(root, {"image_before": "A"})


def test_a_folder_that_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no LevirCCcaptions\.json or LevirCCcaptions\.json\.gz"):
        check_folder(tmp_path)
