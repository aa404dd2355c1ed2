"""The page: what it says, that nothing on it comes from elsewhere, and what it does in a real browser."""

import base64
import html
import io
import json
import logging
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from shapely import MultiPolygon, box

from kcfi.scenes.findings import Date, Shift
from kcfi.scenes.report import area_text, number, outline, printer, render, write_pdf
from tests.kcfi.scenes.conftest import PRINTS, five, make_change, make_findings, make_grid, town, write_work

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium")
THREE = (Date("a.tif", "2018"), Date("b.tif", "2019"), Date("c.tif", "2021"))


def page(findings, folder, printed=False):
    return render(findings, write_work(findings, folder / "work"), printed)


def words(text):
    """What a reader sees, tags removed."""
    text = re.sub(r"<(style|script)>.*?</\1>", " ", text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_the_page_says_all_that_the_findings_say(tmp_path):
    said = words(page(five(warnings=("The dates lie 2.6 px apart.",)), tmp_path))
    assert said.startswith(
        "What changed, 2018 to 2021 What changed, 2018 to 2021 5 changes were found. 5 changes, 5,250 m²"
    )
    assert "88.9 % of the scene seen at every date (6.00 ha) · EPSG:32650 The dates lie 2.6 px apart." in said
    assert (
        "1 building appeared , north-east A building has appeared in the north-east. 2,400 m² 0.95 2 building" in said
    )
    assert "Totals Class Changes m² ha building appeared 2 3,900 0.39 building changed 1 100 0.01" in said
    assert (
        "after.tif resampled from 0.30 to 0.50 m/px +0.40 px right, -0.20 px down spread 0.10 px, 12 windows" in said
    )
    assert "size 600 x 450 px, a pixel is 0.5 x 0.5 m" in said and "stretch [2, 98] Versions kcfi 0.1.0" in said
    assert "first seen" not in said


def test_a_report_of_three_dates_says_when_a_change_was_first_seen(tmp_path):
    findings = five(dates=THREE, shifts=(Shift(0, 0, 0, 0), Shift(3, 1, 0.2, 1, aligned=True)))
    text = page(findings, tmp_path)
    assert words(text).count("2018 to 2021, first seen 2021") == 5 and text.count("<option") == 6
    assert "not estimated: too little texture" in words(text)
    assert "+3.00 px right, +1.00 px down, taken out spread 0.20 px, 1 window" in words(text)


def test_no_change_is_said(tmp_path):
    said = words(page(make_findings(), tmp_path))
    assert "No change was found in the part of the scene that every date shows." in said and "Totals" not in said


def test_areas_are_in_pixels_without_a_crs(tmp_path):
    said = words(page(town(3, make_grid(crs=None)), tmp_path))
    assert "m²" not in said and "ha" not in said.split() and "Changes px" in said and "· pixels" in said


def test_every_text_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    dates = tuple(replace(date, name=evil, path=evil, notes=(evil,)) for date in five().dates)
    change = make_change(1, make_grid(), (10, 10, 90, 90), caption=evil, place=evil, before=evil, after=evil)
    fields = {"caption": evil, "warnings": (evil,), "settings": {evil: evil}, "versions": {evil: evil}, "dates": dates}
    findings = make_findings(changes=[change], **fields)
    text = page(findings, tmp_path)
    assert evil not in text and text.count("<script>") == 1 and words(text).count(evil) >= 12


def test_nothing_on_the_page_comes_from_elsewhere(tmp_path):
    text = page(town(20), tmp_path)
    assert "http:" not in text and "https:" not in text
    addresses = re.findall(r"""(?:href|src)="([^"]*)"|url\\(([^)]*)\\)""", text)
    assert {re.sub(r",.*|(?<=date-)\d+", "", one) for pair in addresses for one in pair if one} == {
        "data:",
        "data:image/jpeg;base64",
        "#date-",
        "#outlines",
    }


def test_pictures_are_bounded_whatever_the_number_of_dates(tmp_path):
    grid = make_grid(4096, 256)
    sizes = {}
    for count in (2, 8):
        dates = tuple(Date(f"{year}.tif", str(year)) for year in range(count))
        text = page(make_findings(grid, dates=dates, shifts=()), tmp_path / str(count))
        pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
        sizes[count] = [Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in pictures]
    assert sizes == {2: [(2048, 128)] * 2, 8: [(1024, 64)] * 8}


def test_an_outline_is_the_polygon_in_pixels_of_the_picture():
    grid = make_grid(600, 450)
    change = make_change(1, grid, (60, 30, 120, 90))
    points = {
        tuple(map(float, point.split(",")))
        for point in re.findall(r"[\d.]+,[\d.]+", outline(change.polygon, grid, 300))
    }
    assert points == {(30, 15), (60, 15), (60, 45), (30, 45)}
    two = MultiPolygon(
        [
            box(400_010, 3_499_900, 400_020, 3_499_910),
            box(400_030, 3_499_900, 400_090, 3_499_990).difference(box(400_040, 3_499_920, 400_050, 3_499_930)),
        ]
    )
    assert outline(two, grid, 600).count("M") == outline(two, grid, 600).count("Z") == 3


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"area_m2": 1249.6}, "1,250 m²"),
        ({"area_m2": 3.25}, "3.2 m²"),
        ({"area_m2": 34_200.0}, "3.42 ha"),
        ({"area_m2": 12_345_678.0}, "1,234.57 ha"),
        ({"area_m2": None, "pixels": 12345}, "12,345 px"),
    ],
)
def test_areas_are_read_at_a_glance(row, text):
    assert area_text(row) == text and number(5) == "5"


def test_the_printed_table_does_not_grow_with_the_changes(tmp_path):
    text = page(town(700, make_grid(1200, 900)), tmp_path, printed=True)
    assert text.count("<tr tabindex") == 500 and "<script" not in text
    assert "The 200 smaller changes are listed in report.html and changes.gpkg." in words(text)


@pytest.mark.skipif(not PRINTS, reason="no Pango")
def test_the_pdf_is_one(tmp_path):
    findings = five()
    write_pdf(findings, write_work(findings, tmp_path / "work"), tmp_path / "report.pdf")
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF-") and b"%%EOF" in content[-64:] and content.count(b"/Subtype /Image") >= 2


def test_cut_off_images_stay_unreadable_where_a_report_was_printed(tmp_path):
    printer()
    image = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(image)
    image.write_bytes(image.read_bytes()[:2000])
    with pytest.raises(OSError, match="truncated"):
        Image.open(image).load()


@pytest.mark.parametrize("missing", ["WeasyPrint", "Pango"])
def test_without_what_prints_a_line_says_what_to_install(tmp_path, monkeypatch, caplog, capsys, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == "weasyprint"]:
        monkeypatch.delitem(sys.modules, name)
    if missing == "WeasyPrint":
        monkeypatch.setitem(sys.modules, "weasyprint", None)
    else:

        def finds_nothing(*_):
            raise OSError("cannot load library")

        monkeypatch.setattr("cffi.FFI.dlopen", finds_nothing)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    write_pdf(five(), tmp_path, tmp_path / "report.pdf")
    assert not (tmp_path / "report.pdf").exists() and capsys.readouterr().out == ""
    assert 'report.pdf is left out: it needs `pip install "kcfi[geo]"` and Pango' in caplog.text


# In a browser


def browse(text, folder, script=""):
    """Open a page, run a script whose `result` comes back, and collect what the console says."""
    path = folder / "page.html"
    probe = f"<script>{script}; document.body.dataset.result = JSON.stringify(result);</script>" if script else ""
    path.write_text(text.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1400,1000"]
    options += [
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    command = [BROWSER, *options, "--dump-dom", path.as_uri()]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in process.stderr.splitlines() if "CONSOLE" in line]
    result = re.search(r'data-result="([^"]*)"', process.stdout)
    return json.loads(html.unescape(result[1])) if result else None, console


@in_browser
@pytest.mark.parametrize("count", [0, 5, 500])
def test_the_page_opens_without_an_error_or_a_request(tmp_path, count):
    grid = make_grid() if count < 100 else make_grid(2400, 1800)
    script = """const result = {
        rows: document.querySelectorAll("#changes tbody tr").length,
        paths: document.querySelectorAll("#outlines path").length,
        shown: document.getElementById("map").getBoundingClientRect().width,
        wide: document.documentElement.scrollWidth > window.innerWidth,
    }"""
    result, console = browse(page(town(count, grid), tmp_path), tmp_path, script)
    assert console == [] and result["rows"] == result["paths"] == count
    assert result["shown"] > 500 and not result["wide"]


@in_browser
def test_an_error_or_a_request_of_the_page_would_be_seen(tmp_path):
    text = page(five(), tmp_path)
    assert "nowhere is not defined" in browse(text, tmp_path, "const result = nowhere()")[1][0]
    asking = text.replace("</h1>", '</h1><img src="https://example.org/a.png">')
    assert "Content Security Policy" in browse(asking, tmp_path)[1][0]


@in_browser
def test_the_swipe_follows_keys_and_rows_and_outlines_choose_each_other(tmp_path):
    script = """
    const get = id => document.getElementById(id), row = id => document.querySelector(`tr[data-id="${id}"]`);
    const chosen = () => [...document.querySelectorAll(".chosen")].map(one => one.tagName + one.dataset.id)
        .sort().join();
    const result = {};
    result.start = [get("divider").getAttribute("x1"), get("window").getAttribute("width")];
    get("swipe").value = 20;
    get("swipe").dispatchEvent(new Event("input"));
    result.swiped = [get("divider").getAttribute("x1"), get("window").getAttribute("width")];
    row(3).click();
    result.byRow = chosen();
    result.view = get("map").getAttribute("viewBox").split(" ").map(Number);
    row(4).dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
    result.byKey = chosen();
    document.querySelector('path[data-id="2"]').dispatchEvent(new MouseEvent("click"));
    result.byOutline = chosen();
    row(1).click();
    document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
    result.escaped = [chosen(), get("map").getAttribute("viewBox")];
    get("drawn").click();
    result.hidden = getComputedStyle(get("outlines")).display;
    """
    result, console = browse(page(five(), tmp_path), tmp_path, script)
    assert console == []
    assert (result["start"], result["swiped"]) == (["300", "300"], ["120", "120"])
    assert (result["byRow"], result["byKey"], result["byOutline"]) == ("TR3,path3", "TR4,path4", "TR2,path2")
    x, y, width, height = result["view"]  # of change 3: (250, 160, 350, 190)
    assert x < 250 and x + width > 350 and y < 160 and y + height > 190 and width < 600
    assert result["escaped"] == ["", "0 0 600 450"] and result["hidden"] == "none"


@in_browser
def test_the_table_sorts_by_every_column_both_ways(tmp_path):
    script = """
    const order = () => [...document.querySelectorAll("#changes tbody tr")].map(row => Number(row.dataset.id));
    const click = key => { document.querySelector(`button[data-key=${key}]`).click(); return order(); };
    const result = { start: order() };
    for (const key of ["id", "class", "probability", "pixels"]) result[key] = [click(key), click(key)];
    result.marked = [...document.querySelectorAll("th[aria-sort]")].map(one => one.textContent + one.ariaSort);
    """
    result, console = browse(page(five(), tmp_path), tmp_path, script)
    assert console == [] and result["start"] == [1, 2, 3, 4, 5]
    assert result["id"] == [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]] and result["class"][0] == [1, 2, 5, 4, 3]
    assert result["probability"] == [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]]
    assert result["pixels"] == [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]] and result["marked"] == ["Areaascending"]


@in_browser
def test_another_date_can_be_chosen_for_each_side(tmp_path):
    script = """
    const seen = () => [...document.querySelectorAll("#pictures image[visibility=visible]")]
        .map(one => one.id + (one.hasAttribute("clip-path") ? " cut" : ""));
    const pick = (side, value) => {
        const one = document.getElementById(side);
        one.value = value;
        one.dispatchEvent(new Event("change"));
    };
    const result = [seen()];
    pick("right", 1); result.push(seen());
    pick("left", 1); result.push(seen());
    """
    findings = five(dates=THREE, shifts=())
    result, console = browse(page(findings, tmp_path), tmp_path, script)
    assert console == [] and result == [["date-2", "date-0 cut"], ["date-1", "date-0 cut"], ["date-1"]]


@in_browser
def test_the_printed_page_shows_both_dates(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page(five(), tmp_path), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    printed = tmp_path / "page.pdf"
    subprocess.run(
        [BROWSER, *options, f"--print-to-pdf={printed}", path.as_uri()], capture_output=True, check=True, timeout=120
    )
    assert printed.read_bytes().count(b"/Subtype /Image") >= 2
