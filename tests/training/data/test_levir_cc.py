import gzip
import json
import re

import numpy as np
import pytest
from PIL import Image

from kcfi.training.data.levir_cc import LevirCCDataset, warn_of_levir_cd
from kcfi.training.load import load_pairs


def edit_captions(root, edit):
    path = root / "LevirCCcaptions.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_an_example_holds_both_dates_mask_and_sentences(root):
    dataset = LevirCCDataset(root, "train")
    assert len(dataset) == 2
    first, second = dataset[0], dataset[1]
    assert first["image_before"].mode == first["image_after"].mode == "RGB"
    assert first["image_before"].getpixel((0, 0)) == (10, 10, 10)
    assert first["image_after"].getpixel((0, 0)) == (100, 100, 100)
    assert first["mask"].mode == "L"
    assert np.unique(first["mask"]).tolist() == [0, 128, 255]
    assert first["captions"] == [f"sentence {n} of a.png ." for n in range(5)]
    assert (first["filename"], first["split"], first["changed"]) == ("a.png", "train", True)
    assert (second["filename"], second["changed"]) == ("b.png", False)


def test_levir_cc_without_label_folder_has_no_masks(root):
    for path in (root / "images/val/label").iterdir():
        path.unlink()
    (root / "images/val/label").rmdir()
    assert LevirCCDataset(root, "val")[0]["mask"] is None


def test_gzipped_captions_are_read(root):
    plain = root / "LevirCCcaptions.json"
    (root / "LevirCCcaptions.json.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert [pair.filename for pair in LevirCCDataset(root, "train").pairs] == ["a.png", "b.png"]


def test_only_the_letter_folder_tells_the_dates_apart(tmp_path, root):
    """A root or a file name with an A in it must not lead to the wrong date."""
    moved = root.rename(tmp_path.parent / f"{tmp_path.name}_A_A")
    assert LevirCCDataset(moved, "train")[0]["image_after"].getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize(
    ("arrange", "error", "message"),
    [
        (lambda root: (root / "LevirCCcaptions.json").unlink(), FileNotFoundError, "no LevirCCcaptions.json"),
        (lambda root: (root / "images/train/B").rename(root / "C"), FileNotFoundError, "train/B: missing or empty"),
        (
            lambda root: [path.unlink() for path in (root / "images/train/A").iterdir()],
            FileNotFoundError,
            "train/A: missing or empty",
        ),
        (lambda root: (root / "LevirCCcaptions.json").write_text("{"), ValueError, "not readable as JSON"),
        (lambda root: (root / "LevirCCcaptions.json").write_text("[]"), ValueError, "no list 'images'"),
        (
            lambda root: edit_captions(root, lambda content: content["images"].append(content["images"][0])),
            ValueError,
            "a.png occurs more than once",
        ),
        (
            lambda root: edit_captions(root, lambda content: content["images"][0].pop("changeflag")),
            ValueError,
            r"images\[0\] is not as in LevirCCcaptions.json \(KeyError\('changeflag'\)\)",
        ),
        (
            lambda root: edit_captions(root, lambda content: content["images"][1].update(sentences=[{"raw": " "}])),
            ValueError,
            "b.png has an empty sentence",
        ),
        (
            lambda root: edit_captions(root, lambda content: content["images"][1].update(filename="../A/b.png")),
            ValueError,
            r"\.\./A/b\.png in split train: expected names without a folder",
        ),
        (
            lambda root: edit_captions(root, lambda content: content["images"][2].update(split=None)),
            ValueError,
            r"images\[2\] is not as in LevirCCcaptions.json \(TypeError",
        ),
    ],
)
def test_a_broken_folder_is_refused_at_construction(root, arrange, error, message):
    arrange(root)
    with pytest.raises(error, match=message):
        LevirCCDataset(root, "train")


def test_a_pair_without_sentences_keeps_its_flag_and_its_mask(root):
    edit_captions(root, lambda content: content["images"][1].update(sentences=[]))
    example = LevirCCDataset(root, "train")[1]
    assert example["captions"] == [] and example["changed"] is False and np.asarray(example["mask"]).any()


@pytest.fixture
def masks_alone(root):
    """The folder in the layout of LEVIR-CD: no sentences, and nothing marked in b.png."""
    for split in ("train", "val"):
        (root / "images" / split).rename(root / split)
    (root / "LevirCCcaptions.json").unlink()
    Image.new("L", (8, 6)).save(root / "train/label/b.png")
    return root


def test_a_folder_of_masks_alone_has_no_sentences_and_is_changed_where_its_masks_are(masks_alone):
    pairs = load_pairs(str(masks_alone), "train")
    assert [(pair["filename"], pair["changed"], pair["captions"]) for pair in (pairs[0], pairs[1])] == [
        ("a.png", True, []),
        ("b.png", False, []),
    ]
    assert pairs[0]["image_after"].getpixel((0, 0)) == (100, 100, 100)
    assert len(load_pairs(str(masks_alone), "val")) == 1
    with pytest.raises(ValueError, match="no pair of split 'test'; its splits: train, val"):
        load_pairs(str(masks_alone), "test")


def test_a_folder_of_masks_alone_names_what_is_missing(masks_alone):
    (masks_alone / "train/B/a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"train/B/a\.png"):
        load_pairs(str(masks_alone), "train")[0]
    (masks_alone / "train/B/b.png").unlink()
    with pytest.raises(FileNotFoundError, match="train/B: missing or empty"):
        load_pairs(str(masks_alone), "train")


def test_an_unknown_split_is_refused_with_those_that_exist(root):
    with pytest.raises(ValueError, match="no pair of split 'test'; its splits: train, val"):
        LevirCCDataset(root, "test")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        LevirCCDataset(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("folder", ["A", "B", "label"])
def test_a_missing_partner_is_named(root, folder):
    path = root / "images/train" / folder / "a.png"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        LevirCCDataset(root, "train")[0]


@pytest.mark.parametrize("folder", ["A", "B", "label"])
def test_a_broken_image_is_named_and_spares_the_others(root, folder):
    path = root / "images/train" / folder / "a.png"
    path.write_bytes(path.read_bytes()[:50])
    dataset = LevirCCDataset(root, "train")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: cannot be read as an image"):
        dataset[0]
    assert dataset[1]["filename"] == "b.png"


@pytest.mark.parametrize("folder", ["B", "label"])
def test_a_partner_of_another_size_is_named_with_both_sizes(root, folder):
    Image.new("L", (4, 4)).save(root / "images/train" / folder / "a.png")
    with pytest.raises(ValueError, match=rf"{folder}/a\.png: 4 x 4 pixels, but .*/A/a\.png has 8 x 6"):
        LevirCCDataset(root, "train")[0]


def test_pairs_named_like_those_of_levir_cd_are_warned_of(caplog):
    warn_of_levir_cd(["test_000002.png", "train_000051.png", "town_2.png"])  # of LEVIR-CC, drawn or anybody's
    assert caplog.records == []
    warn_of_levir_cd(["train_36_0512_0512.png", "images/test_2.png", "test_000002.png"])
    [record] = caplog.records
    assert "2 pairs have file names of LEVIR-CD: images/test_2.png, train_36_0512_0512.png." in record.getMessage()
    assert "for a model trained on them this is no zero-shot score" in record.getMessage()
