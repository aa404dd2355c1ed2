"""The site: what is in its folder, what is refused, and what it does in a real browser, on hosts of both kinds."""

import io
import json
import math
import re
import shutil
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyproj
import pytest
import rasterio
from affine import Affine
from PIL import Image
from rio_cogeo import cog_validate

from kcfi.processing import InputError
from kcfi.scenes import site
from kcfi.scenes.findings import Date, Shift
from kcfi.scenes.site import LIBRARIES, check_site, write_site
from kcfi.scenes.writers import write_findings
from tests.kcfi.scenes.conftest import five, make_change, make_findings, make_grid, save_raster, write_work

ROOT = Path(__file__).parents[3]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 180_000  # ms for what takes a second: without a GPU, beside other jobs, a map is slow
CREDIT = "Nobody in particular, CC0 & <more>"
WIDE, NARROW = {"width": 1000, "height": 660}, {"width": 390, "height": 844}
pytestmark = pytest.mark.skipif(not (LIBRARIES / "LICENSES.txt").is_file(), reason="no libraries: `make libraries`")
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium")


def draw_dates(findings, folder):
    """Images of the dates of findings: a slope of colours each, with the changes on the later ones."""
    grid = findings.grid
    rows, columns = np.mgrid[: grid.height, : grid.width] / [[[grid.height]], [[grid.width]]]
    paths = []
    for number in range(len(findings.dates)):
        tone = np.full_like(rows, 60 + 80 * number)
        pixels = np.stack([40 + 60 * rows, tone, 90 + 60 * columns], axis=-1).astype(np.uint8)
        for change in findings.changes if number else ():
            left, top, right, bottom = change.box
            pixels[top:bottom, left:right] = (220, 200, 40)
        path = save_raster(folder / f"image-{number}.tif", pixels, grid.crs, grid.transform)
        with rasterio.open(path, "r+") as file:
            file.update_tags(TIFFTAG_COPYRIGHT=CREDIT)
        paths.append(path)
    return paths


def make_report(findings, folder):
    """The report of findings, and images of its dates."""
    folder.mkdir(exist_ok=True)
    findings = replace(findings, settings={**findings.settings, "bands": None, "stretch": None})
    write_findings(findings, write_work(findings, folder / "work"), folder / "report")
    return folder / "report", draw_dates(findings, folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Report, images and site of `five`."""
    folder = tmp_path_factory.mktemp("made")
    report, dates = make_report(five(warnings=("The dates lie 2.6 px apart.",)), folder)
    write_site(report, dates, folder / "site")
    return report, dates, folder / "site"


# The folder


def test_the_site_holds_rasters_polygons_libraries_with_licences_and_a_page(made):
    folder = made[2]
    names = [
        "changes.geojson",
        "date-0.tif",
        "date-1.tif",
        "index.html",
        "libraries",
        "mask.tif",
        "site.css",
        "site.js",
    ]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "changes.geojson").read_bytes() == (made[0] / "changes.geojson").read_bytes()
    licences = (folder / "libraries/LICENSES.txt").read_text(encoding="utf-8")
    locked = json.loads((ROOT / "libraries/package-lock.json").read_text())["packages"]
    for path, package in locked.items():
        name = path.rpartition("node_modules/")[2]
        assert not name or f"==== {name} {package['version']}, {package['license']} ====" in licences
    assert licences.count("Redistribution and use in source and binary forms") > 2 and "Apache License" in licences


def test_the_lock_file_names_hashes_and_no_registry():
    locked = json.loads((ROOT / "libraries/package-lock.json").read_text())["packages"]
    packages = [package for path, package in locked.items() if path]
    assert len(packages) > 20 and all(package["integrity"].startswith("sha512-") for package in packages)
    assert not any("resolved" in package for package in packages)


def test_rasters_are_cogs_in_the_tiles_of_web_maps_and_show_what_was_compared(made):
    _, dates, folder = made
    for name in ("date-0.tif", "date-1.tif", "mask.tif"):
        valid, errors, warnings = cog_validate(folder / name)
        assert valid and not errors, (errors, warnings)
        with rasterio.open(folder / name) as file:
            assert file.crs.to_epsg() == 3857 and file.block_shapes[0] == (512, 512)
            corner = (file.transform.c / file.res[0] + 2**26) % 512, (file.transform.f / file.res[0] + 2**26) % 512
            assert all(min(offset, 512 - offset) < 1e-3 for offset in corner)
    there = pyproj.Transformer.from_crs(32650, 3857, always_xy=True)
    for path, name in zip(dates, ("date-0.tif", "date-1.tif"), strict=True):
        with rasterio.open(path) as before, rasterio.open(folder / name) as file:
            pixels = before.read()
            for column, row in [(50, 50), (500, 60), (300, 175), (560, 400)]:
                place = there.transform(*(before.transform @ (column + 0.5, row + 0.5)))
                [value] = file.sample([place])
                assert value[3] == 255 and np.abs(value[:3].astype(int) - pixels[:, row, column]).max() < 12
            [outside] = file.sample([there.transform(*(before.transform @ (-3, 200)))])
            assert outside[3] == 0
    with rasterio.open(folder / "mask.tif") as mask:
        place = there.transform(*(make_grid().transform @ (500, 60)))
        assert [int(value) for [value] in mask.sample([place])] == [2] and set(np.unique(mask.read())) == {
            0,
            1,
            2,
            255,
        }


def test_a_date_is_shown_as_it_was_compared_aligned_and_stretched(tmp_path):
    grid = make_grid()
    findings = make_findings(grid, [make_change(1, grid, (100, 100, 200, 200))], shifts=(Shift(40, 0, 0.1, 9, True),))
    findings = replace(findings, settings={**findings.settings, "bands": [1, 2, 3], "stretch": [0, 100]})
    write_findings(findings, write_work(findings, tmp_path / "work"), tmp_path / "report")
    pixels = np.zeros((450, 600, 3), np.uint16)
    pixels[:, :340] = 4000  # shifted by 40 px: the edge of the scene's 300
    dates = [save_raster(tmp_path / f"{n}.tif", pixels, grid.crs, grid.transform) for n in (0, 1)]
    write_site(tmp_path / "report", dates, tmp_path / "site")
    there = pyproj.Transformer.from_crs(32650, 3857, always_xy=True)
    for number, edge in ((0, 340), (1, 300)):
        with rasterio.open(tmp_path / f"site/date-{number}.tif") as file:
            inside, outside = (there.transform(*(grid.transform @ (edge + side, 200))) for side in (-6, 6))
            white, black = file.sample([inside, outside])
            assert white[0] > 240 and black[0] < 15


def test_the_same_report_gives_the_same_bytes_and_replaces_an_earlier_site(made, tmp_path):
    report, dates, folder = made
    shutil.copytree(folder, tmp_path / "site")
    (tmp_path / "site/date-7.tif").write_bytes(b"of an earlier site of more dates")
    (tmp_path / "site/CNAME").write_text("of whoever hosts it")
    write_site(report, dates, tmp_path / "site")
    assert (tmp_path / "site/CNAME").read_text() == "of whoever hosts it"
    (tmp_path / "site/CNAME").unlink()
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = tmp_path / "site"
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()} == files


def test_every_text_is_escaped_and_the_page_asks_for_nothing_from_elsewhere(tmp_path):
    evil = '</script><script>alert("x")</script><b>'
    dates = tuple(replace(date, name=evil, path=evil) for date in five().dates)
    change = make_change(1, make_grid(), (10, 10, 90, 90), caption=evil, place=evil)
    settings = {"model": "/home/somebody/runs/paper"}
    dates = (replace(dates[0], path="/home/somebody/2019.tif"), *dates[1:])
    warnings = (evil, "/home/somebody/2019.tif: its pixels are larger")
    findings = make_findings(changes=[change], caption=evil, warnings=warnings, dates=dates, settings=settings)
    write_site(*make_report(findings, tmp_path), tmp_path / "site")
    page = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert evil not in page and page.count("<script") == 3
    assert page.count("&lt;/script&gt;&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;") >= 8
    assert "Found by a model, paper, which" in page and "<li>2019.tif: its pixels" in page
    assert "somebody" not in page  # what is shared tells of no folders
    assert "Imagery: Nobody in particular, CC0 &amp; &lt;more&gt;</p>" in page
    addresses = re.findall(r"""(?:href|src)="([^"]*)\"""", page)
    assert not [address for address in addresses if "//" in address and not address.startswith("data:")]


# What is refused


def test_what_has_no_place_on_a_map_is_refused(tmp_path):
    pixels = np.zeros((20, 20, 3), np.uint8)
    plain = save_raster(tmp_path / "plain.tif", pixels, crs=None)
    with pytest.raises(InputError, match=r"plain\.tif: a site is a map, and needs images with a coordinate reference"):
        check_site(tmp_path / "site", tmp_path / "report", [plain])
    polar = save_raster(tmp_path / "polar.tif", pixels, "EPSG:3995", Affine(30, 0, -300, 0, -30, 300))
    with pytest.raises(InputError, match=r"polar\.tif: lies across the antimeridian or at a pole"):
        check_site(tmp_path / "site", tmp_path / "report", [polar])
    assert not (tmp_path / "site").exists()


def test_a_site_that_was_being_moved_when_it_was_stopped_is_written_anew(made, tmp_path):
    report, dates, folder = made
    shutil.copytree(folder, tmp_path / "site")
    (tmp_path / "site/.unfinished").mkdir()
    (tmp_path / "site/index.html").rename(tmp_path / "site/.unfinished/index.html")
    page = write_site(report, dates, tmp_path / "site")
    assert page.read_bytes() == (folder / "index.html").read_bytes() and not (tmp_path / "site/.unfinished").exists()


def test_a_folder_with_other_files_the_report_and_other_dates_are_refused(made, tmp_path):
    report, dates, _ = made
    (tmp_path / "index.html").write_text("<h1>mine</h1>")
    with pytest.raises(InputError, match=r"index\.html: the site would replace it, and it is of no earlier site"):
        write_site(report, dates, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    with pytest.raises(InputError, match="is the folder of the report"):
        check_site(report, report, dates)
    with pytest.raises(InputError, match="is of 2 dates; got 3 images"):
        write_site(report, [*dates, dates[0]], tmp_path / "site")
    with pytest.raises(InputError, match="so no report"):
        write_site(tmp_path, dates, tmp_path / "site")


def test_without_the_libraries_a_line_says_what_to_run(made, tmp_path, monkeypatch):
    monkeypatch.setattr(site, "LIBRARIES", tmp_path / "nothing")
    with pytest.raises(InputError, match="run `make libraries`"):
        check_site(tmp_path / "site", *made[:2])


# In a browser


class Plain(SimpleHTTPRequestHandler):
    """The server of `python -m http.server`, which does not know of parts of a file; it notes what is asked."""

    asked: list

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.asked.append((self.path, self.headers.get("Range")))
        super().do_GET()


class Ranged(Plain):
    """A static host that gives parts of a file."""

    def do_GET(self):
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            return super().do_GET()
        self.asked.append((self.path, self.headers["Range"]))
        content = Path(self.translate_path(self.path)).read_bytes()
        first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(content[first : last + 1])


@pytest.fixture
def serve():
    """A function that serves a folder on a port of this machine; returns its address and what is asked of it."""
    servers = []

    def start(folder, kind=Plain):
        asked = []
        handler = partial(type("Handler", (kind,), {"asked": asked}), directory=folder)
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    options = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
    options.append("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=options)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """A function that opens a page; at the end nothing may have gone wrong on any."""
    said = []
    contexts = []

    def go(address, viewport=WIDE, **more):
        contexts.append(chromium.new_context(viewport=viewport, **more))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: said.append(f"{request.url}: {request.failure}"))
        page.goto(address)
        settle(page)
        return page

    yield go
    for context in contexts:
        context.close()
    assert said == []


def settle(page):
    """Wait until both maps show what they shall."""
    page.wait_for_timeout(150)
    page.wait_for_selector("#maps[aria-busy=false]")
    page.wait_for_timeout(150)


class Screen:
    """Where the whole scene lies on the screen, by the arithmetic of web maps."""

    def __init__(self, page, grid):
        self.box = page.locator("#maps").bounding_box()
        settings = json.loads(page.locator("#settings").text_content())
        self.grid, self.there = grid, pyproj.Transformer.from_crs(grid.crs, 3857, always_xy=True)
        earth = pyproj.Transformer.from_crs(4326, 3857, always_xy=True)
        west, south, east, north = settings["bounds"]
        (left, bottom), (right, top) = earth.transform(west, south), earth.transform(east, north)
        finest = 2 * math.pi * 6378137 / settings["side"] / 2 ** (settings["zoom"] + 1)
        free = self.box["width"] - 32, self.box["height"] - 32
        self.pixel = max((right - left) / free[0], (top - bottom) / free[1], finest)  # in m of the map
        self.centre = (left + right) / 2, (bottom + top) / 2

    def place(self, column, row):
        """Pixel of the grid -> pixel of the screen."""
        x, y = self.there.transform(*(self.grid.transform @ (column, row)))
        across, down = ((x - self.centre[0]) / self.pixel, (self.centre[1] - y) / self.pixel)
        return self.box["x"] + self.box["width"] / 2 + across, self.box["y"] + self.box["height"] / 2 + down

    def colours(self, page, places):
        """What the screen shows at pixels of the grid."""
        image = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)
        return [image[round(y), round(x)] for x, y in (self.place(*place) for place in places)]


GRID_POINTS = [(column, row) for column in range(15, 600, 30) for row in range(15, 450, 25)]


def differences(screen, page, paths, divided):
    """Of each point: the largest difference between the screen and the image that must be seen there."""
    images = []
    for path in paths:
        with rasterio.open(path) as file:
            images.append(file.read().transpose(1, 2, 0).astype(int))
    edge = screen.box["x"] + screen.box["width"] * divided
    found = []
    for point, colour in zip(GRID_POINTS, screen.colours(page, GRID_POINTS), strict=True):
        if abs(screen.place(*point)[0] - edge) > 20:  # not under the swipe
            shown = images[screen.place(*point)[0] > edge]
            found.append(np.abs(colour - shown[point[1], point[0]]).max())
    return np.array(found)


@in_browser
@pytest.mark.parametrize("kind", [Plain, Ranged])
def test_the_swipe_divides_the_dates_pixel_by_pixel_and_follows_keys_and_pointer(made, serve, visit, kind):
    _, dates, folder = made
    address, asked = serve(folder, kind)
    page = visit(address)
    page.uncheck("#outlines")
    settle(page)
    screen = Screen(page, make_grid())
    page.mouse.move(5, 5)
    seen = differences(screen, page, dates, 0.5)
    assert len(seen) > 250 and np.median(seen) <= 3 and np.quantile(seen, 0.97) < 16
    wrong = differences(screen, page, dates[::-1], 0.5)
    assert np.median(wrong) > 40  # what the test would see were the dates swapped

    page.focus("#swipe")
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    assert page.input_value("#swipe") == "70"
    seen = differences(screen, page, dates, 0.7)
    assert np.median(seen) <= 3 and np.quantile(seen, 0.97) < 16

    middle = screen.box["y"] + 30
    page.mouse.move(screen.box["x"] + 0.7 * screen.box["width"], middle)
    page.mouse.down()
    page.mouse.move(screen.box["x"] + 0.3 * screen.box["width"], middle, steps=4)
    page.mouse.up()
    assert abs(float(page.input_value("#swipe")) - 30) <= 0.5
    seen = differences(screen, page, dates, 0.3)
    assert np.median(seen) <= 3 and np.quantile(seen, 0.97) < 16

    assert page.locator(".credit").text_content() == f"Imagery: {CREDIT}"
    rasters = [(path, part) for path, part in asked if path.endswith(".tif")]
    once = sorted(path for path, part in rasters if part == "bytes=0-0")
    assert once == ["/date-0.tif", "/date-1.tif"]
    assert len(rasters) == 2 if kind is Plain else len(rasters) > 2


@in_browser
def test_a_click_on_a_polygon_tells_what_changed_there_and_the_list_flies_to_it(made, serve, visit):
    page = visit(serve(made[2])[0])
    screen = Screen(page, make_grid())
    assert page.locator(".change").count() == 5 and page.locator(".maplibregl-popup").count() == 0
    page.mouse.click(*screen.place(500, 60))  # change 1, right of the swipe
    popup = page.locator(".maplibregl-popup-content")
    said = [part.inner_text().strip() for part in popup.locator(".what, .sentence, .numbers").all()]
    assert said == [
        "1: building appeared, north-east",
        "A building has appeared in the north-east.",
        "2,400 m² · probability 0.95",
    ]
    assert page.locator(".chosen").get_attribute("id") == "change-1" and page.url.endswith("#change-1")
    page.mouse.click(*screen.place(70, 50))  # change 2, left of it: on the other map
    assert "A building has appeared in the north-west." in popup.inner_text()
    page.mouse.click(*screen.place(200, 300))  # none
    assert popup.count() == 0 and page.locator(".chosen").count() == 0 and "#" not in page.url

    page.locator("#change-4").focus()
    page.keyboard.press("Enter")
    settle(page)
    assert page.evaluate("document.activeElement.id") == "change-4"  # Tab goes on in the list
    assert "A building has removed in the south-east." in popup.inner_text()
    box, tip = page.locator("#maps").bounding_box(), page.locator(".maplibregl-popup-tip").bounding_box()
    x, y = tip["x"] + tip["width"] / 2, tip["y"] + tip["height"]
    assert abs(x - box["x"] - box["width"] / 2) < 40 and 120 < y - box["y"] < box["height"] / 2 + 50
    page.keyboard.press("Escape")
    page.click("#whole")
    settle(page)
    page.mouse.click(*screen.place(340, 175))
    assert "A road has appeared in the centre." in popup.inner_text()


@in_browser
def test_a_link_to_a_change_shows_it(made, serve, visit):
    page = visit(serve(made[2])[0] + "#change-3")
    assert "A road has appeared in the centre." in page.locator(".maplibregl-popup-content").inner_text()


@in_browser
def test_outlines_and_the_mask_can_be_switched(made, serve, visit):
    page = visit(serve(made[2])[0])
    screen = Screen(page, make_grid())
    inside, bare = (550, 75), (200, 300)  # of change 1; nothing
    edge = [(580 + step / 4, 60) for step in range(-4, 5)]
    page.mouse.move(5, 5)

    def seen():
        settle(page)
        return screen.colours(page, [inside, bare, *edge])

    def near(colour, other):
        return np.abs(colour - np.array(other)).max() < 14

    outlined = seen()
    assert any(near(colour, (255, 96, 0)) for colour in outlined[2:]) and not near(outlined[0], (220, 200, 40))
    page.uncheck("#outlines")
    plain = seen()
    assert near(plain[0], (220, 200, 40)) and not any(near(colour, (255, 96, 0)) for colour in plain[2:])
    page.mouse.click(*screen.place(*inside))
    assert page.locator(".maplibregl-popup").count() == 0  # what is not shown is not clicked on
    page.mouse.move(5, 5)
    page.check("#mask")
    masked = seen()
    assert near(masked[0], (255, 96, 0)) and near(masked[1], plain[1])


@in_browser
def test_it_fits_a_phone(made, serve, visit):
    page = visit(serve(made[2])[0], NARROW, has_touch=True, device_scale_factor=2)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    screen = Screen(page, make_grid())
    assert screen.box["width"] == 390 and screen.box["height"] > 400
    page.touchscreen.tap(*screen.place(500, 60))
    popup = page.locator(".maplibregl-popup-content")
    assert "A building has appeared in the north-east." in popup.inner_text()
    page.locator("#change-5").tap()
    settle(page)
    box = popup.bounding_box()
    assert "A building has changed in the north-east." in popup.inner_text()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and 0 <= box["y"] < 844


@in_browser
def test_of_a_series_any_two_dates_stand_side_by_side(serve, visit, tmp_path):
    days = (Date("a.tif", "2018"), Date("b.tif", "2019"), Date("c.tif", "2021"))
    findings = five(dates=days, shifts=(Shift(0, 0, 0, 0), Shift(0, 0, 0, 0)))
    report, dates = make_report(findings, tmp_path)
    write_site(report, dates, tmp_path / "site")
    page = visit(serve(tmp_path / "site")[0])
    page.uncheck("#outlines")
    page.mouse.move(5, 5)
    screen = Screen(page, findings.grid)
    assert "first seen 2021" in page.locator("#change-1").inner_text()
    assert page.locator("#right").input_value() == "2" and page.locator("#left").input_value() == "0"
    settle(page)
    assert np.median(differences(screen, page, [dates[0], dates[2]], 0.5)) <= 3
    page.select_option("#right", label="2019")
    page.select_option("#left", label="2021")
    settle(page)
    assert np.median(differences(screen, page, [dates[2], dates[1]], 0.5)) <= 3


@in_browser
def test_a_scene_without_changes_is_a_map_too(serve, visit, tmp_path):
    write_site(*make_report(make_findings(), tmp_path), tmp_path / "site")
    page = visit(serve(tmp_path / "site")[0])
    assert "No change was found" in page.locator("#list").inner_text() and page.locator("#problem").is_hidden()


@in_browser
def test_what_goes_wrong_is_said_on_the_page(made, serve, chromium, tmp_path):
    shutil.copytree(made[2], tmp_path / "site")
    (tmp_path / "site/date-1.tif").unlink()
    problem = {}
    for name, address in {"file": (made[2] / "index.html").as_uri(), "missing": serve(tmp_path / "site")[0]}.items():
        page = chromium.new_page()
        page.goto(address)
        page.wait_for_selector("#problem:not([hidden])", timeout=PATIENCE)
        problem[name] = page.locator("#problem").text_content()
        assert page.locator(".change").count() == 5  # what changed can be read all the same
        page.close()
    assert "The map needs a web server: run `python -m http.server`" in problem["file"]
    assert problem["missing"] == "date-1.tif cannot be read (404)"
