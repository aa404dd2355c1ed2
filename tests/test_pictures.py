"""Pictures for people: overlays and contact sheets."""

import numpy as np
import pytest
from PIL import Image

from kcfi.pictures import CHANGE_COLOURS, Bar, bar_chart, contact_sheet, heat_map, overlay


@pytest.mark.parametrize(("road", "building"), [(128, 255), (1, 2)])
def test_overlay_tells_roads_from_buildings_and_leaves_the_rest(road, building):
    image = Image.new("RGB", (16, 12), (100, 110, 120))
    mask = np.zeros((12, 16), np.uint8)
    mask[2:10, 1:7], mask[2:10, 9:15] = road, building
    drawn = np.asarray(overlay(image, mask))
    assert (drawn[mask == 0] == (100, 110, 120)).all()
    for value, (row, column) in ((road, (2, 1)), (building, (2, 9))):
        colour = np.array(CHANGE_COLOURS[value])
        assert (drawn[row, column] == colour).all()  # the outline is opaque
        inner = drawn[row + 3, column + 3].astype(int)
        assert (np.abs(inner - colour) < np.abs(np.array((100, 110, 120)) - colour)).all()
    assert (drawn[2, 1] != drawn[2, 9]).any()


def test_overlay_refuses_a_mask_of_another_size():
    with pytest.raises(ValueError, match="mask is 8 x 4 px, the image 16 x 12"):
        overlay(Image.new("RGB", (16, 12)), np.zeros((4, 8), np.uint8))


def test_heat_map_is_blue_where_features_are_weak_and_red_where_they_are_strong():
    values = np.linspace(0, 7, 12 * 16, dtype=np.float32).reshape(12, 16)
    drawn = np.asarray(heat_map(Image.new("RGB", (16, 12), "grey"), values)).astype(int)
    red_over_blue = drawn[..., 0] - drawn[..., 2]
    assert drawn.shape == (12, 16, 3) and red_over_blue[0].max() < 0 < red_over_blue[-1].min()
    even = np.asarray(heat_map(Image.new("RGB", (16, 12)), np.full((12, 16), 3.0)))
    assert (even == even[0, 0]).all()
    with pytest.raises(ValueError, match="values for 8 x 4 px, the image 16 x 12"):
        heat_map(Image.new("RGB", (16, 12)), np.zeros((4, 8)))


def test_contact_sheet_shows_every_image_in_its_row_and_column():
    colours = [["red", "lime"], ["blue", "black"]]
    rows = [[Image.new("RGB", (8, 8), colour) for colour in row] for row in colours]
    plain = np.asarray(contact_sheet(rows, tile=32))
    centres = [[plain[6 + 16 + y * 38, 6 + 16 + x * 38].tolist() for x in range(2)] for y in range(2)]
    assert centres == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]]
    titled = contact_sheet(rows, ["one\ntwo", "three"], ["before", "after"], tile=32)
    assert titled.height == plain.shape[0] + 22 and titled.width == plain.shape[1] + 420
    assert (np.asarray(titled)[28:60, 90:] < 128).any()  # the text of the first row


def test_contact_sheet_refuses_captions_that_do_not_match():
    with pytest.raises(ValueError, match="1 captions for 2 rows"):
        contact_sheet([[], []], ["only one"])
    with pytest.raises(ValueError, match="no rows"):
        contact_sheet([])


def test_bars_are_as_long_as_their_values_and_marks_stand_at_the_references():
    bars = [Bar("one", "a", 50.0), Bar("one", "b", 100.0, 0.0, 75.0), Bar("two", "c", None, 0.0, 25.0)]
    chart = np.asarray(bar_chart(bars, "title"))
    blue = (chart == CHANGE_COLOURS[1]).all(-1)
    orange = (chart == CHANGE_COLOURS[2]).all(-1)
    rows = np.flatnonzero(blue.any(1))
    half, full = rows[0] + 2, rows[-1] - 2
    assert blue[half].sum() == pytest.approx(230, abs=2) and blue[full].sum() == pytest.approx(460, abs=5)
    start = np.flatnonzero(blue[half])[0]
    marks = [np.flatnonzero(orange[row]).mean() - start for row in (full, np.flatnonzero(orange.any(1))[-1])]
    assert marks == pytest.approx([345, 115], abs=2)


def test_a_bar_chart_needs_bars():
    with pytest.raises(ValueError, match="no bars"):
        bar_chart([], "title")
