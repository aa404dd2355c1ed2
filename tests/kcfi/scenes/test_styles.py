"""QGIS styles: every class and kind has its symbol, in the colours of the project."""

from xml.etree import ElementTree

import pytest

from kcfi.pictures import CHANGE_COLOURS
from kcfi.scenes.styles import colour, mask_style, polygon_style
from tests.kcfi.scenes.conftest import five


def test_polygons_are_coloured_by_class_and_outlined_by_kind():
    root = ElementTree.fromstring(polygon_style(five()))
    renderer = root.find("renderer-v2")
    assert (root.tag, renderer.get("type")) == ("qgis", "categorizedSymbol")
    assert renderer.get("attr") == """concat("class", ' ', "kind")"""
    symbols = {symbol.get("name"): symbol for symbol in renderer.iter("symbol")}
    seen = {}
    for category in renderer.iter("category"):
        options = symbols[category.get("symbol")].iter("Option")
        settings = {option.get("name"): option.get("value") for option in options if option.get("name")}
        seen[category.get("value")] = (
            settings["outline_color"],
            settings["outline_style"],
            settings["color"].rpartition(",")[2],
        )
    road, building = (",".join(map(str, (*CHANGE_COLOURS[value], 255))) for value in (1, 2))
    assert seen == {
        "road appeared": (road, "solid", "90"),
        "road removed": (road, "dash", "0"),
        "road changed": (road, "dot", "0"),
        "building appeared": (building, "solid", "90"),
        "building removed": (building, "dash", "0"),
        "building changed": (building, "dot", "0"),
    }


def test_the_mask_shows_classes_and_nothing_where_nothing_changed():
    root = ElementTree.fromstring(mask_style(five()))
    renderer = root.find("pipe/rasterrenderer")
    assert (renderer.get("type"), renderer.get("band")) == ("paletted", "1")
    entries = [
        (entry.get("value"), entry.get("label"), entry.get("color"), entry.get("alpha")) for entry in renderer[0]
    ]
    assert entries == [
        ("0", "no change", "#000000", "0"),
        ("1", "road", "#00c8ff", "255"),
        ("2", "building", "#ff6000", "255"),
    ]


def test_a_name_that_xml_would_read_as_its_own_is_escaped():
    findings = five(labels={1: 'a < "b" & c'})
    for style in (polygon_style(findings), mask_style(findings)):
        labels = [element.get("label") or "" for element in ElementTree.fromstring(style).iter()]
        assert any(label.startswith('a < "b" & c') for label in labels)


def test_a_class_that_the_mask_does_not_have_has_no_colour():
    with pytest.raises(ValueError, match="not enough values"):
        colour(five(), "tree")
