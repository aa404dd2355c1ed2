import json

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from kcfi.training.materials import cut as materials
from kcfi.training.materials.cut import cut_roofs, cut_scene_textures, write_library
from kcfi.training.materials.sources import SURFACES, Picture
from kcfi.training.synthetic.material_library import LibraryMaterials
from kcfi_cli import main

LEGEND = {"building": [200, 0, 0], "land": [0, 200, 0], "road": [0, 0, 200], "water": [0, 200, 200]}
COLOURS = {"building": (150, 60, 50), "land": (80, 110, 60), "road": (120, 120, 120), "water": (50, 80, 80)}
AREAS = {"land": (0, 0, 64, 128), "road": (64, 0, 128, 64), "water": (64, 64, 128, 100)}  # at 0.5 m/px; rest unknown
HOUSE = (16, 20, 56, 44)


def draw_town(scale=1.0):
    """An image of 128 x 128 px at 0.5 m/px with a house on grass, a road and water, and its mask."""
    side = round(128 * scale)
    image, mask = Image.new("RGB", (side, side)), Image.new("RGB", (side, side))
    for surface, area in [*AREAS.items(), ("building", HOUSE)]:
        box = [round(value * scale) - end for value, end in zip(area, (0, 0, 1, 1), strict=True)]
        ImageDraw.Draw(image).rectangle(box, COLOURS[surface])
        ImageDraw.Draw(mask).rectangle(box, tuple(LEGEND[surface]))
    return image, mask


@pytest.fixture
def town(tmp_path):
    """Writes a source of six labelled images in three regions."""

    def write(folder="town", scale=1.0, **values):
        root = tmp_path / folder
        description = {"name": "town", "licence": "CC0", "metres_per_pixel": 0.5 / scale, "labels": "masks"}
        description |= {"legend": LEGEND, "regions": "(.)_.", "val": ["1"], "test": ["2"], **values}
        for part, picture in zip(("images", "masks"), draw_town(scale), strict=True):
            (root / part).mkdir(parents=True)
            for number in range(6):
                picture.save(root / part / f"{number // 2}_{number}.png")
        (root / "source.yaml").write_text(yaml.safe_dump(description))
        return root

    return write


def read_entries(library):
    return json.loads((library / "materials.json").read_text())["entries"]


def test_everything_is_cut_from_a_labelled_source(town, tmp_path):
    counts = write_library([town()], tmp_path / "library")
    assert counts == {"villa roof": 6, "tile": 6, "grass": 6, "asphalt": 6}
    for entry in read_entries(tmp_path / "library"):
        image = Image.open(tmp_path / "library" / entry["file"])
        assert (entry["source"], entry["licence"]) == ("town", "CC0")
        if entry["kind"] in ("grass", "asphalt"):
            surface = {"grass": "land", "asphalt": "road"}[entry["kind"]]
            assert min(image.size) >= 48
            assert np.abs(np.asarray(image).astype(int) - COLOURS[surface]).max() <= 3  # jpg
        if entry["kind"] == "tile":
            labels = np.asarray(Image.open(tmp_path / "library" / entry["label"]))
            expected = np.full((128, 128), 64)  # water and unknown: keep off
            expected[:, :64], expected[:64, 64:], expected[20:44, 16:56] = 0, 128, 255
            assert (labels == expected).all()


@pytest.mark.parametrize("scale", [0.5, 1.6, 4])
def test_everything_is_brought_to_half_a_metre(town, tmp_path, scale):
    write_library([town(scale=scale)], tmp_path / "library")
    for entry in read_entries(tmp_path / "library"):
        size = Image.open(tmp_path / "library" / entry["file"]).size
        if entry["kind"] == "tile":
            assert size == (128, 128) == Image.open(tmp_path / "library" / entry["label"]).size
        if entry["kind"] == "villa roof":
            assert size == pytest.approx((40, 24), abs=1)


def test_a_region_is_never_shared_between_splits(town, tmp_path):
    write_library([town()], tmp_path / "library")
    splits = {(entry["region"], entry["split"]) for entry in read_entries(tmp_path / "library")}
    assert splits == {("0", "train"), ("1", "val"), ("2", "test")}


def test_the_reader_draws_with_the_library(town, tmp_path):
    write_library([town()], tmp_path / "library")
    library, rng = LibraryMaterials(tmp_path / "library"), np.random.default_rng(0)
    assert np.asarray(library.texture("grass", 100, rng)).mean((0, 1)) == pytest.approx(COLOURS["land"], abs=3)
    assert library.roof("villa roof", rng).mode == "RGBA"
    image, labels = library.tile(True, 128, rng)
    house = np.asarray(image)[labels == 255].mean(0)
    assert house == pytest.approx(COLOURS["building"], abs=8)


@pytest.mark.parametrize("degrees", [0, 20, 40, 70, 110])
@pytest.mark.parametrize("metres", [0.2, 0.5, 0.8])
def test_roofs_are_turned_upright_with_their_pixels(degrees, metres):
    """A roof of 40 m x 24 m whose two halves differ, at an angle."""
    side, long, wide = round(80 / metres), 20 / metres, 12 / metres
    y, x = (np.mgrid[:side, :side] + 0.5) - side / 2
    angle = np.radians(degrees)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    inside = (abs(u) < long) & (abs(v) < wide)
    pixels = np.where(inside[..., None], np.where((u > 0)[..., None], (140, 100, 80), (80, 100, 140)), (0, 255, 0))
    labels = np.where(inside, SURFACES.index("building"), SURFACES.index("open")).astype(np.uint8)
    picture = Picture(Image.fromarray(pixels.astype(np.uint8)), labels, (metres, metres))
    ((kind, roof),) = cut_roofs(picture)
    assert kind == "large roof" and sorted(roof.size) == pytest.approx([48, 80], abs=2)
    cut = np.asarray(roof, np.float32)
    if degrees in (70, 110):  # turned by the smaller angle, so that light still comes from where it did
        cut = cut.swapaxes(0, 1)
    assert cut[4:-4, 4:-4, 3].min() > 250
    red = cut[8:-8, :, 0] - cut[8:-8, :, 2]
    halves = red[:, 6:30].mean(), red[:, -30:-6].mean()
    assert sorted(halves) == pytest.approx([-60, 60], abs=4)


@pytest.mark.parametrize(
    ("polygon", "reason"),
    [
        ([(0, 20), (40, 20), (40, 50), (0, 50)], "touches the border"),
        ([(20, 20), (60, 20), (20, 60)], "half of its rectangle"),
        ([(20, 20), (29, 20), (29, 60), (20, 60)], "narrower than 12 px"),
        ([(20, 20), (140, 20), (140, 120), (20, 120)], "above 8,000 px"),
    ],
)
def test_what_is_not_one_whole_roof_is_left_out(polygon, reason):
    labels = Image.new("L", (160, 160), SURFACES.index("open"))
    ImageDraw.Draw(labels).polygon(polygon, SURFACES.index("building"))
    picture = Picture(Image.new("RGB", (160, 160), (120, 80, 70)), np.asarray(labels), (0.5, 0.5))
    assert list(cut_roofs(picture)) == [], reason


def test_a_patchwork_of_roofs_under_one_label_is_left_out():
    labels = np.full((80, 80), SURFACES.index("open"), np.uint8)
    labels[20:60, 20:60] = SURFACES.index("building")
    pixels = np.full((80, 80, 3), 60, np.uint8)
    assert len(list(cut_roofs(Picture(Image.fromarray(pixels), labels, (0.5, 0.5))))) == 1
    pixels[20:60, 20:40] = 200
    assert list(cut_roofs(Picture(Image.fromarray(pixels), labels, (0.5, 0.5)))) == []


def test_an_even_scene_is_one_texture_and_a_mixed_one_gives_windows_of_its_even_part():
    scene = Image.new("RGB", (152, 152), COLOURS["land"])
    assert [(kind, texture.size) for kind, texture in cut_scene_textures(scene, ["grass"])] == [("grass", (152, 152))]
    assert list(cut_scene_textures(scene, ["asphalt", "soil"])) == []  # of another colour
    scene.paste((200, 200, 210), (80, 0, 152, 152))
    windows = list(cut_scene_textures(scene, ["grass"]))
    assert [kind for kind, _ in windows] == ["grass"] * 3
    for _, window in windows:
        assert window.size == (48, 48) and (np.asarray(window) == COLOURS["land"]).all()


def test_folders_of_scene_classes_give_textures_and_tiles_with_their_class(tmp_path):
    root = tmp_path / "scenes"
    for scene in ("park", "houses"):
        (root / scene).mkdir(parents=True)
        Image.new("RGB", (256, 240), COLOURS["land"]).save(root / scene / "1.png")
    description = {"name": "scenes", "licence": "CC0", "metres_per_pixel": 0.3}
    description["classes"] = {"park": ["grass"], "houses": []}
    (root / "source.yaml").write_text(yaml.safe_dump(description))
    assert write_library([root], tmp_path / "library") == {"tile": 2, "grass": 1}
    tiles = [entry for entry in read_entries(tmp_path / "library") if entry["kind"] == "tile"]
    assert {entry["scene"] for entry in tiles} == {"park", "houses"} and "label" not in tiles[0]
    assert Image.open(tmp_path / "library" / tiles[0]["file"]).size == (154, 144)


def test_large_places_are_cut_and_parts_without_labels_left_out(town, tmp_path, monkeypatch):
    monkeypatch.setattr(materials, "MAX_TILE", 100)
    write_library([town()], tmp_path / "library")
    tiles = [entry for entry in read_entries(tmp_path / "library") if entry["kind"] == "tile"]
    sizes = {Image.open(tmp_path / "library" / tile["file"]).size for tile in tiles}
    assert len(tiles) == 6 * 3  # of four parts, one is water and unknown
    assert sizes == {(64, 64)}


def test_only_so_many_of_a_kind_are_kept_of_each_split(town, tmp_path, monkeypatch):
    monkeypatch.setattr(materials, "ROOFS_PER_KIND", 1)
    assert write_library([town()], tmp_path / "library")["villa roof"] == 3
    files = {entry["file"] for entry in read_entries(tmp_path / "library")}
    on_disk = {
        path.relative_to(tmp_path / "library").as_posix()
        for folder in ("roofs", "textures", "tiles")
        for path in (tmp_path / "library" / folder).iterdir()
    }
    assert files == on_disk


def test_the_same_sources_give_the_same_library(town, tmp_path):
    root = town()
    for name in ("one", "two"):
        write_library([root], tmp_path / name)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"legend": {"building": [1, 1, 1]}}, "no building in any image"),
        ({"labels": "labels"}, "labels: no such file or folder"),
    ],
)
def test_a_refused_source_leaves_nothing_behind(town, tmp_path, values, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        write_library([town(**values)], tmp_path / "out/library")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_sources_need_names_of_their_own(town, tmp_path):
    sources = [town(), town("village")]
    with pytest.raises(ValueError, match="two sources are named 'town'"):
        write_library(sources, tmp_path / "library")


def test_the_command_writes_a_library_with_a_sheet_and_never_over_another(town, tmp_path, capsys):
    arguments = ["data", "materials", "--source", str(town()), "--output", str(tmp_path / "library")]
    assert main(arguments) == 0
    assert "villa roof: 6" in capsys.readouterr().out
    assert Image.open(tmp_path / "library/contact_sheet.png").height > 4 * 144
    assert main(arguments) == 2
    assert "is not an empty folder" in capsys.readouterr().err
