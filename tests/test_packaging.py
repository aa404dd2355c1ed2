"""Wheel and sdist: what is in them, and that no other name is installed beside `kcfi` and its command."""

import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {  # of the repository -> in the wheel
    "kcfi": "kcfi",
    "modeling_kcfi": "kcfi/modeling_kcfi",
    "processing": "kcfi/processing",
    "training": "kcfi/training",
    "hub_configs": "kcfi/hub_configs",
    "kcfi_cli": "kcfi_cli",
}
FILES = ["setup.cfg", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"]


def own_files(folder: str) -> set[str]:
    """Files of a package folder, by their path in the wheel; links inside kcfi/ are not followed."""
    top = ROOT / folder
    paths = {path for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    linked = {link for link in top.iterdir() if link.is_symlink()}
    return {
        f"{FOLDERS[folder]}/{path.relative_to(top).as_posix()}"
        for path in paths
        if not linked.intersection(path.parents)
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a build reads, so that nothing is left in the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    return copy


def build(folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *options, str(folder)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def dist(checkout):
    """Folder with the sdist and the wheel that was built from the sdist."""
    build(checkout)
    return checkout / "dist"


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata_and_contents(dist):
    [wheel] = dist.glob("*.whl")
    found = names(wheel)
    metadata = {name for name in found if name.split("/")[0].endswith(".dist-info")}
    return metadata, found - metadata


def test_the_wheel_installs_no_other_names_than_kcfi_and_its_command(dist):
    _, contents = metadata_and_contents(dist)
    assert {name.split("/")[0] for name in contents} == {"kcfi", "kcfi_cli"}


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(dist):
    _, contents = metadata_and_contents(dist)
    assert contents == set().union(*map(own_files, FOLDERS))
    assert {"kcfi/py.typed", "kcfi/training/recipes/debug.yaml", "kcfi/hub_configs/__init__.py"} <= contents


def test_the_wheel_has_licence_and_command(dist):
    metadata, _ = metadata_and_contents(dist)
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    [wheel] = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [entry_points] = [name for name in metadata if name.endswith("entry_points.txt")]
        assert "kcfi = kcfi_cli:main" in archive.read(entry_points).decode()


def test_the_sdist_builds_the_wheel_of_the_checkout_without_the_links(dist, checkout, tmp_path):
    [sdist] = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    paths = {"/".join(Path(member.name).parts[1:]) for member in members}
    assert not any(member.issym() or member.islnk() for member in members)
    assert not any(path.startswith(("tests", "kcfi/modeling_kcfi", "kcfi/training")) for path in paths)
    assert {"LICENSE", "README.md", "setup.cfg", "pyproject.toml"} <= paths

    build(checkout, "--wheel", "--outdir", str(tmp_path))
    [from_checkout], [from_sdist] = tmp_path.glob("*.whl"), dist.glob("*.whl")
    assert names(from_checkout) == names(from_sdist)


def test_every_folder_with_code_is_a_package_of_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    mapped = dict(line.split(" = ") for line in setup["options"]["package_dir"].strip().splitlines())
    assert mapped == {wheel.replace("/", "."): folder for folder, wheel in FOLDERS.items()}
    with_code = {
        Path(path).parent.as_posix().replace("/", ".")
        for folder in FOLDERS
        for path in own_files(folder)
        if path.endswith(".py")
    }
    assert set(setup["options"]["packages"].split()) == with_code


def test_links_in_a_checkout_lead_to_the_folders_of_the_map():
    links = {path.name: path.resolve() for path in (ROOT / "kcfi").iterdir() if path.is_symlink()}
    assert links == {folder: ROOT / folder for folder, wheel in FOLDERS.items() if wheel.startswith("kcfi/")}
