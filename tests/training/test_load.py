import pytest

from kcfi.training.load import load_pairs


def test_load_pairs_takes_the_first_pairs_of_a_folder(root):
    assert [example["filename"] for example in load_pairs(str(root), "train")] == ["a.png", "b.png"]
    assert [example["filename"] for example in load_pairs(str(root), "train", num_pairs=1)] == ["a.png"]
    assert len(load_pairs(str(root), "train", num_pairs=99)) == 2
    with pytest.raises(ValueError, match="num_pairs is 0"):
        load_pairs(str(root), "train", num_pairs=0)


def test_load_pairs_draws_synthetic_pairs():
    dataset = load_pairs("synthetic", "val", num_pairs=3, seed=7)
    assert len(dataset) == 3
    assert dataset[0].keys() == {
        "image_before",
        "image_after",
        "mask",
        "captions",
        "changed",
        "filename",
        "split",
    }
    assert len(load_pairs("synthetic", "test")) == 500
    with pytest.raises(ValueError, match="split 'dev' is unknown"):
        load_pairs("synthetic", "dev")
