"""The project's colours as QGIS styles: QGIS finds `NAME.qml` beside `NAME.tif` and `NAME.gpkg` by itself."""

from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from kcfi.pictures import CHANGE_COLOURS
from kcfi.scenes.findings import Findings

KINDS = {"appeared": "solid", "removed": "dash", "changed": "dot"}  # kind -> its outline, in QGIS's words
FILLED = 90  # opacity of a polygon's inside, of 255


def colour(findings: Findings, label: str) -> tuple[int, int, int]:
    """The colour of a class, RGB."""
    [value] = [value for value, name in findings.labels.items() if name == label]
    return CHANGE_COLOURS[value]


def polygon_style(findings: Findings) -> str:
    """Polygons of change by class (colour) and kind (outline), as QML."""
    root = Element("qgis", version="3.22", styleCategories="Symbology")
    expression = 'concat("class", \' \', "kind")'
    renderer = SubElement(root, "renderer-v2", type="categorizedSymbol", attr=expression, enableorderby="0")
    categories, symbols = SubElement(renderer, "categories"), SubElement(renderer, "symbols")
    pairs = [(label, kind) for label in findings.labels.values() for kind in KINDS]
    for number, (label, kind) in enumerate(pairs):
        text = f"{label} {kind}"
        SubElement(categories, "category", value=text, label=text, symbol=str(number), render="true", type="string")
        symbol = SubElement(symbols, "symbol", name=str(number), type="fill", alpha="1", force_rhr="0")
        symbol.set("clip_to_extent", "1")
        layer = SubElement(symbol, "layer", {"class": "SimpleFill", "pass": "0", "locked": "0", "enabled": "1"})
        rgb = ",".join(map(str, colour(findings, label)))
        settings = {
            "color": f"{rgb},{FILLED if kind == 'appeared' else 0}",
            "style": "solid",
            "outline_color": f"{rgb},255",
            "outline_style": KINDS[kind],
            "outline_width": "0.5",
            "outline_width_unit": "MM",
        }
        options = SubElement(layer, "Option", type="Map")
        for name, value in settings.items():
            SubElement(options, "Option", name=name, value=value, type="QString")
    return _document(root)


def mask_style(findings: Findings) -> str:
    """The mask by class, nothing where nothing changed, as QML."""
    root = Element("qgis", version="3.22", styleCategories="Symbology")
    attributes = {"type": "paletted", "band": "1", "opacity": "1", "alphaBand": "-1", "nodataColor": ""}
    palette = SubElement(SubElement(SubElement(root, "pipe"), "rasterrenderer", attributes), "colorPalette")
    SubElement(palette, "paletteEntry", value="0", label="no change", color="#000000", alpha="0")
    for value, label in findings.labels.items():
        code = "#" + bytes(colour(findings, label)).hex()
        SubElement(palette, "paletteEntry", value=str(value), label=label, color=code, alpha="255")
    return _document(root)


def _document(root: Element) -> str:
    ElementTree.indent(root)
    head = "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
    return head + ElementTree.tostring(root, encoding="unicode") + "\n"
