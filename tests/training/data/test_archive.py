import io
import shutil
import tarfile
import zipfile
from collections import namedtuple

import datasets
import numpy as np
import pytest

from kcfi.training.data import archive
from kcfi.training.data.shards import write_shards
from kcfi.training.load import load_pairs
from kcfi_cli import main


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def pack(root, kind):
    """An archive that holds the folder."""
    return shutil.make_archive(str(root.parent / "levir"), kind, root.parent, root.name)


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_an_archive_of_the_distributed_folder_is_converted(root, tmp_path, kind, capsys):
    """Failed before: "levir.zip: no such folder"."""
    file = pack(root, kind)
    assert main(["data", "convert", file, "--output", str(tmp_path / "out" / "shards")]) == 0
    expected, found = load_pairs(str(root), "train"), load_pairs(str(tmp_path / "out" / "shards"), "train")
    pairs = {pair["filename"]: pair for pair in found}
    assert len(expected) == len(pairs) == 2
    for pair in expected:
        for key in ("image_before", "image_after", "mask"):
            assert np.array_equal(np.asarray(pair[key]), np.asarray(pairs[pair["filename"]][key]))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shards"]  # nothing unpacked stays


@pytest.mark.parametrize(("depth", "found"), [(0, True), (1, True), (2, True), (3, False)])
def test_the_captions_file_may_lie_two_folders_deep(root, tmp_path, depth, found):
    deep = tmp_path / "packed"
    shutil.copytree(root, deep.joinpath(*"abc"[:depth]), dirs_exist_ok=True)
    file = shutil.make_archive(str(tmp_path / "levir"), "zip", deep)
    if found:
        write_shards(file, tmp_path / "shards")
        assert (tmp_path / "shards" / "README.md").is_file()
    else:
        with pytest.raises(FileNotFoundError, match=r"levir.zip: no LevirCCcaptions.json .* first 2 levels"):
            write_shards(file, tmp_path / "shards")


def test_an_archive_of_two_data_sets_is_refused(root, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(root, tmp_path / "packed" / name)
    file = shutil.make_archive(str(tmp_path / "levir"), "tar", tmp_path / "packed")
    with pytest.raises(ValueError, match=r"holds several data sets \(one, two\)"):
        write_shards(file, tmp_path / "shards")


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/tmp/out.txt"])
def test_a_zip_that_leads_out_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "levir.zip", "w") as content:
        content.writestr(name, "x")
    with pytest.raises(ValueError, match=r"levir.zip: .*out.txt leads out of the folder"):
        write_shards(tmp_path / "levir.zip", tmp_path / "below" / "shards")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "levir.zip"]


@pytest.mark.parametrize("kind", ["path", "link", "device"])
def test_a_tar_that_leads_out_is_refused(tmp_path, kind):
    entry = tarfile.TarInfo("../out.txt" if kind == "path" else "LevirCCcaptions.json")
    if kind == "link":
        entry.type, entry.linkname = tarfile.SYMTYPE, "../../secret"
    if kind == "device":
        entry.type = tarfile.CHRTYPE
    with tarfile.open(tmp_path / "levir.tar.gz", "w:gz") as content:
        content.addfile(entry, io.BytesIO(b""))
    with pytest.raises(ValueError, match=r"levir.tar.gz: cannot be unpacked \("):
        write_shards(tmp_path / "levir.tar.gz", tmp_path / "below" / "shards")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "levir.tar.gz"]
    assert list((tmp_path / "below").iterdir()) == []


def test_an_archive_for_which_there_is_no_room_is_not_unpacked(root, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 0, 10)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: usage)
    for kind in ("zip", "gztar"):
        with pytest.raises(ValueError, match=r"unpacked it needs .* left: choose an --output on another disk"):
            write_shards(pack(root, kind), tmp_path / "shards")


@pytest.mark.parametrize("content", [b"no archive", b"PK\x03\x04", b"\x1f\x8b\x08"])
def test_what_is_no_archive_or_damaged_is_refused(root, tmp_path, content):
    file = tmp_path / "levir.zip"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"levir.zip: (neither a folder nor a zip or tar archive|cannot be unpacked)"):
        write_shards(file, tmp_path / "shards")
    whole = pack(root, "zip")
    damaged = bytearray((tmp_path / "levir.zip").read_bytes())
    damaged[60:200] = bytes(140)
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"levir.zip: cannot be unpacked \("):
        write_shards(whole, tmp_path / "shards")


def test_an_archive_as_data_set_says_to_convert_it(root, tmp_path, capsys):
    file = pack(root, "zip")
    for command in (["evaluate", "--no-meteor", "--output", str(tmp_path / "r.json"), "--dataset"], ["data", "check"]):
        assert main([*command, file]) == 2
        error = capsys.readouterr().err
        assert "levir.zip is a file, no folder" in error and "kcfi data convert ARCHIVE --output shards" in error
