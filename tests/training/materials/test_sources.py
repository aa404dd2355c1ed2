import numpy as np
import pytest
import yaml
from PIL import Image

from kcfi.training.materials.cut import LIMITS, read_picture
from kcfi.training.materials.sources import SURFACES, read_source

DESCRIPTION = {"name": "town", "licence": "CC0", "metres_per_pixel": 0.5, "labels": "masks"}


@pytest.fixture
def town(tmp_path):
    """Writes a source of images 8 px wide, a/1, a/2 and b/1, with masks whose first column is white."""

    def write(**values):
        mask = np.zeros((6, 8), np.uint8)
        mask[:, 0] = 255
        for stem in ("a/1", "a/2", "b/1"):
            for folder, pixels in (("images", np.zeros((6, 8, 3), np.uint8)), ("masks", mask)):
                path = tmp_path / "town" / folder / f"{stem}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        description = {key: value for key, value in {**DESCRIPTION, **values}.items() if value is not None}
        (tmp_path / "town/source.yaml").write_text(yaml.safe_dump(description))
        return tmp_path / "town"

    return write


def read(root):
    return read_source(root, list(LIMITS))


@pytest.mark.parametrize("name", ["ucmerced", "dubai", "banepa"])
def test_the_packaged_descriptions_serve_folders_of_their_names(tmp_path, name):
    (tmp_path / name).mkdir()
    source = read(tmp_path / name)
    assert source.name and source.licence and source.metres_per_pixel > 0
    assert bool(source.labels) != bool(source.classes)


def test_a_region_is_in_one_split_only(town):
    places = read(town(regions="images/(.)/", test=["b"])).places()
    assert [(place.region, place.split) for place in places] == [("a", "train"), ("a", "train"), ("b", "test")]
    assert all(place.labels.relative_to(place.labels.parents[1]).with_suffix("").name in "12" for place in places)


def test_without_regions_a_source_is_all_train(town):
    assert {(place.region, place.split) for place in read(town()).places()} == {("all", "train")}


def test_without_a_legend_what_is_not_black_is_building(town):
    source = read(town())
    labels = read_picture(source, source.places()[0]).labels
    assert (labels[:, 0] == SURFACES.index("building")).all() and (labels[:, 1:] == SURFACES.index("open")).all()


def test_colours_that_are_not_in_the_legend_are_unknown(town):
    source = read(town(legend={"road": [255, 255, 255]}))
    labels = read_picture(source, source.places()[0]).labels
    assert (labels[:, 0] == SURFACES.index("road")).all() and (labels[:, 1:] == SURFACES.index("unknown")).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"licence": None}, "licence is missing"),
        ({"metres_per_pixel": "0.5 m"}, "metres_per_pixel is '0.5 m'; expected a number"),
        ({"label": "masks"}, "Unknown entry 'label': did you mean 'labels'"),
        ({"legend": ["road"]}, r"legend is \['road'\]; expected a table"),
        ({"classes": "woods"}, "classes is 'woods'; expected a table"),
        ({"legend": {"house": [1, 2, 3]}}, "Unknown surface in legend 'house'"),
        ({"legend": {"road": [1, 2, 300]}}, "road is .* expected a colour"),
        ({"val": "3"}, r'expected a list of regions, for example \["3"\]'),
        ({"val": [3], "test": ["3"]}, "region '3' is in val and in test"),
        ({"labels": None, "classes": {"park": "grass"}}, r"expected a list .* for example \[woods\]"),
        ({"labels": None, "classes": {"park": ["gras"]}}, "texture of park 'gras': did you mean 'grass'"),
        ({"classes": {"park": ["grass"]}}, "classes stand instead of images and labels"),
        ({"regions": "("}, "regions is no regular expression"),
    ],
)
def test_descriptions_that_are_wrong_are_refused_with_their_file(town, values, message):
    with pytest.raises(ValueError, match=rf"source.yaml: .*{message}"):
        read(town(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"regions": "images/(.)/", "val": ["c"]}, "no image is in region 'c', .*; regions: a, b"),
        ({"regions": r"tile(\d)"}, r"regions 'tile\(\\d\)' finds no group in the path 'images/a/1.png'"),
        ({"images": "pictures"}, "pictures: no such folder"),
        ({"labels": "labels"}, "labels: no such file or folder"),
        ({"images": "masks/b", "labels": "images"}, "1.png: no labels; expected .*images/1 with .png, .tif"),
        ({"labels": None, "classes": {"park": []}}, "park: no such folder"),
    ],
)
def test_files_that_the_description_promises_must_exist(town, values, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read(town(**values)).places()


def test_a_mask_of_another_size_is_refused(town):
    root = town()
    Image.new("L", (8, 7)).save(root / "masks/a/1.png")
    source = read(root)
    with pytest.raises(ValueError, match=r"masks/a/1.png: 8 x 7 px, but .*images/a/1.png has 8 x 6"):
        read_picture(source, source.places()[0])


def test_a_folder_without_a_description_is_told_what_to_write(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source.yaml does not exist: .* example: name: .*metres_per_pixel"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        read(tmp_path / "nowhere")


def test_a_folder_without_images_is_refused(town):
    root = town(labels=None)
    for path in root.glob("images/*/*.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no image \(.png, .*\) in images"):
        read(root).places()
