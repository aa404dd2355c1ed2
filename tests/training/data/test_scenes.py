import shutil
from pathlib import Path

import datasets
import pytest

from kcfi.processing import InputError
from kcfi.training.data.readable_pairs import ReadablePairs
from kcfi.training.data.rows import RowDataset
from kcfi.training.data.scenes import choose, column_of, scene_of, take_scenes
from kcfi.training.data.shards import write_shards
from kcfi.training.load import load_pairs

NAMES = [f"val_{number:06d}.png" for number in range(1, 161)]  # ten scenes of sixteen crops
REAL = Path(__file__).parents[3] / "../shared/data/levir_cc_val"


def test_sixteen_numbers_in_a_row_are_one_scene_from_one_on():
    scenes = [scene_of(name, 16) for name in NAMES]
    assert scenes[0] == scenes[15] == "val_ 1" and scenes[16] == "val_ 2" and len(set(scenes)) == 10
    assert scene_of("train_000017.png", 16) != scene_of("val_000017.png", 16)
    with pytest.raises(InputError, match=r"a\.png: its name does not end in the number of a crop"):
        scene_of("a.png", 16)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_smaller_number_is_part_of_a_larger_one_and_made_of_whole_scenes(seed):
    chosen = [choose(NAMES, count, 16, seed) for count in (10, 40, 160)]
    assert [len(some) for some in chosen] == [10, 40, 160]
    assert set(chosen[0]) < set(chosen[1]) < set(chosen[2])
    assert all(some == sorted(some) for some in chosen)
    crops = [sum(scene_of(NAMES[index], 16) == f"val_ {scene}" for index in chosen[1]) for scene in range(1, 11)]
    assert sorted(crops) == [0] * 7 + [8, 16, 16]


def test_the_choice_depends_on_names_and_seed_and_on_nothing_else():
    def named(names, count, seed):
        return {names[index] for index in choose(names, count, 16, seed)}

    assert named(NAMES, 40, 0) == named(NAMES[::-1], 40, 0) != named(NAMES, 40, 1)
    chosen = named(NAMES, 32, 0)
    without = [name for name in NAMES if scene_of(name, 16) in {scene_of(one, 16) for one in chosen}]
    assert named(without, 32, 0) == chosen  # scenes that are not there move none of the others


@pytest.mark.parametrize("count", [0, 161])
def test_a_number_of_pairs_that_there_are_not_is_refused(count):
    with pytest.raises(InputError, match=f"num_train_pairs={count}: there are 1 to 160 pairs"):
        choose(NAMES, count, 16, 0)


@pytest.fixture
def numbered(root, tmp_path, monkeypatch):
    """The folder of two training pairs with numbers for names, and its shards."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    captions = root / "LevirCCcaptions.json"
    text = captions.read_text()
    for old, new in (("a.png", "train_000001.png"), ("b.png", "train_000017.png")):
        text = text.replace(old, new)
        for kind in ("A", "B", "label"):
            shutil.move(root / "images" / "train" / kind / old, root / "images" / "train" / kind / new)
    captions.write_text(text)
    write_shards(root, tmp_path / "shards")
    return root, tmp_path / "shards"


def test_a_folder_and_its_shards_give_the_same_pairs(numbered):
    for seed in range(4):
        taken = [take_scenes(load_pairs(str(source), "train"), 1, 16, seed) for source in numbered]
        names = [column_of(pairs, "filename") for pairs in taken]
        assert names[0] == names[1] == [taken[0][0]["filename"]] == [taken[1][0]["filename"]]
        assert [len(pairs) for pairs in taken] == [1, 1] and taken[1].sizes == [1]
        captions = [column_of(pairs, "captions") for pairs in taken]
        assert captions[0] == captions[1] == [taken[1][0]["captions"]]


def test_what_has_no_names_to_choose_by_is_refused(make_pairs, numbered):
    with pytest.raises(InputError, match="crops_per_scene=16 chooses by the file names"):
        take_scenes(make_pairs(), 2, 16, 0)
    with pytest.raises(InputError, match="give both, or neither"):
        take_scenes(load_pairs(str(numbered[0]), "train"), None, 16, 0)
    for crops in (0, -16):
        with pytest.raises(InputError, match=f"crops_per_scene={crops} must be at least 1"):
            take_scenes(load_pairs(str(numbered[0]), "train"), 1, crops, 0)
    assert column_of(make_pairs(2), "filename") == ["pair_0.png", "pair_1.png"]


def test_sentences_of_rows_are_read_without_their_images():
    images = {"image_before": "missing.png", "image_after": "missing.png"}
    captions = [["a house appears ."], ["nothing ."]]
    rows = [{**images, "captions": some, "changed": True, "filename": f"{some[0]}.png"} for some in captions]
    pairs = RowDataset(datasets.Dataset.from_list(rows))
    with pytest.raises(FileNotFoundError):
        pairs[0]
    assert column_of(pairs, "captions") == column_of(ReadablePairs(pairs), "captions") == captions


@pytest.mark.skipif(not REAL.is_dir(), reason="the real pairs are not here")
def test_the_real_pairs_fall_into_43_scenes():
    names = column_of(load_pairs(str(REAL), "train"), "filename")
    assert len(names) == 608 and len({scene_of(name, 16) for name in names}) == 43
    assert len({scene_of(names[index], 16) for index in choose(names, 38, 16, 0)}) in (3, 4)
