import numpy as np
import pytest
from PIL import Image

from kcfi.training.data.pairs import CLASS_NAMES, class_ids, grey_mask, num_classes

FILE_VALUES = np.array([[0, 128, 255], [255, 0, 128]], np.uint8)


@pytest.mark.parametrize(
    ("mask_classes", "expected"),
    [
        ("change", [[0, 1, 1], [1, 0, 1]]),
        ("building", [[0, 0, 1], [1, 0, 0]]),
        ("road_building", [[0, 1, 2], [2, 0, 1]]),
    ],
)
def test_each_file_value_becomes_its_class(mask_classes, expected):
    ids = class_ids(Image.fromarray(FILE_VALUES), mask_classes, "m.png")
    assert ids.dtype == np.uint8
    assert ids.tolist() == expected
    assert num_classes(mask_classes) == len(CLASS_NAMES[mask_classes]) == max(map(max, expected)) + 1


def test_any_other_file_value_is_refused_by_name():
    for value in set(range(256)) - {0, 128, 255}:
        mask = Image.fromarray(np.array([[0, value]], np.uint8))
        with pytest.raises(ValueError, match=rf"^m\.png: mask value {value} is unknown"):
            class_ids(mask, "change", "m.png")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_a_mask_of_equal_channels_is_grey(mode):
    mask = Image.fromarray(FILE_VALUES).convert(mode)
    assert np.array_equal(grey_mask(mask, "m.png"), FILE_VALUES)


def test_a_black_and_white_mask_holds_0_and_255():
    mask = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert class_ids(mask, "building", "m.png").tolist() == [[0, 1]]


def test_a_coloured_mask_is_refused():
    with pytest.raises(ValueError, match=r"m\.png: a colour mask"):
        class_ids(Image.new("RGB", (2, 2), (255, 255, 0)), "change", "m.png")


def test_a_16_bit_mask_is_refused():
    with pytest.raises(ValueError, match=r"m\.png: mask of mode I;16"):
        class_ids(Image.new("I;16", (2, 2), 255), "change", "m.png")
