"""The page in a real browser, with kcfi-tiny: before, while and after a run, wide and as narrow as a phone.

`KCFI_SHOTS=folder` keeps the screenshots.
"""

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from kcfi.demo.page import EXAMPLES
from kcfi.models import embedded_model, load
from kcfi.processing import Describer
from tests.kcfi.demo.conftest import serve_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]
WAIT = 120_000  # ms
ORANGE = (255, 96, 0)  # outline of a building


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with serve_page(embedded_model(), tmp_path_factory.mktemp("page")) as client:
        yield client


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 390])
def tab(request, chromium, tiny):
    """A tab with the page, that asks nobody but its server and has no errors in its console."""
    context = chromium.new_context(viewport={"width": request.param, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    asked, errors = [], []
    page.on("request", lambda each: asked.append(each.url))
    page.on("pageerror", lambda each: errors.append(str(each)))
    page.on("console", lambda each: errors.append(each.text) if each.type == "error" else None)
    page.goto(tiny.address)
    page.wait_for_selector("#describe")
    yield page
    outside = [url for url in asked if not url.startswith((tiny.address, "data:", "blob:"))]
    assert asked and not outside
    assert [error for error in errors if "413" not in error] == []  # of which one test is
    context.close()


def shoot(page, name):
    """A screenshot of the whole page, kept if asked for; nothing lies beside it."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    content = page.screenshot(full_page=True)
    if folder := os.environ.get("KCFI_SHOTS"):
        (Path(folder) / f"{page.viewport_size['width']}_{name}.png").write_bytes(content)
    return content


def later_date(page):
    """The picture behind the slider's right half."""
    page.wait_for_function(
        "[...document.querySelectorAll('#dates img')].every(each => each.complete && each.naturalWidth)"
    )
    address = page.locator("#dates img").nth(1).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB")).astype(int)


def orange(pixels):
    """How many pixels are about the colour of a building's outline."""
    return int((np.abs(pixels - ORANGE).sum(-1) < 120).sum())


def test_an_example_is_described_and_the_threshold_recolours_it(tab, tiny):
    assert "will be told here" in tab.inner_text("#sentence")
    shoot(tab, "before")
    tab.click("#example-hall_")
    tab.wait_for_selector(".sentence")
    report = Describer(*load("kcfi-tiny", device="cpu")).describe(
        *(str(EXAMPLES / f"hall_{date}.png") for date in ("before", "after"))
    )
    assert tab.inner_text(".sentence") == report.caption
    assert f"{report.changed_probability:.0%}" in tab.inner_text(".sure")
    tab.wait_for_selector("#areas table")
    marked, table = later_date(tab), tab.inner_text("#areas")
    shoot(tab, "after")

    calls = []
    hooks = [part.register_forward_hook(lambda *_: calls.append(1)) for part in tiny.guard.runs.parts]
    tab.focus("#threshold input[type=range]")
    for _ in range(8):
        tab.keyboard.press("ArrowRight")
    tab.wait_for_function("text => document.querySelector('#areas').innerText != text", arg=table)
    tab.wait_for_selector("a.download[href$='threshold=0.9']")
    higher = later_date(tab)
    tab.focus("#masked input")
    tab.keyboard.press("Space")
    tab.wait_for_function(
        "url => document.querySelectorAll('#dates img')[1].src != url",
        arg=tab.locator("#dates img").nth(1).get_attribute("src"),
    )
    plain = later_date(tab)
    for hook in hooks:
        hook.remove()
    assert calls == []
    assert orange(marked) > orange(higher) > 0 and orange(plain) < orange(higher)
    original = np.asarray(Image.open(EXAMPLES / "hall_after.png").convert("RGB")).astype(int)
    assert np.abs(plain - original).mean() < 8 < np.abs(marked - original).mean()

    with tab.expect_download() as download:
        tab.click("a.download")
    assert download.value.suggested_filename.endswith(".zip")


def test_a_pair_of_files_is_described_and_its_run_is_seen(tab, tmp_path):
    for date in ("before", "after"):
        image = Image.open(EXAMPLES / f"hall_{date}.png").convert("RGB")
        large = Image.new("RGB", (600, 500))
        for x, y in ((0, 0), (256, 0), (512, 0), (0, 256), (256, 256), (512, 256)):
            large.paste(image, (x, y))
        large.save(tmp_path / f"{date}.jpg", quality=95)
        tab.set_input_files(f"#{date} input[type=file]", tmp_path / f"{date}.jpg")
        tab.wait_for_selector(f"#{date} img")
    tab.click("#describe")
    tab.wait_for_selector("#sentence >> text=/processing|queue/")
    shoot(tab, "while")
    tab.wait_for_selector(".sentence")
    assert "part that changed most" in tab.inner_text("#sentence")


def test_the_keys_move_the_border_between_the_dates(tab):
    tab.click("#example-streets_")
    tab.wait_for_selector(".sentence")
    border = tab.locator('#dates [data-testid="slider"]')
    border.focus()
    first = int(border.get_attribute("aria-valuenow"))
    for _ in range(3):
        tab.keyboard.press("ArrowLeft")
    tab.wait_for_function(
        "value => document.querySelector('#dates [data-testid=slider]').ariaValueNow < value - 3", arg=first
    )
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    shoot(tab, "keys")


def test_everything_is_reached_by_tab(tab):
    tab.click("#example-hall_")
    tab.wait_for_selector("#areas a.download")
    tab.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        tab.keyboard.press("Tab")
        reached.add(
            tab.evaluate(
                "document.activeElement.closest("
                "'#describe, [id^=example-], #dates, #masked, #threshold, #areas, #before, #after')?.id"
            )
        )
    assert reached >= {"before", "after", "describe", "example-hall_", "dates", "masked", "threshold", "areas"}


def test_a_large_image_is_refused_with_a_message(tab, tmp_path):
    for date in ("before", "after"):
        Image.new("L", (3000, 2000)).save(tmp_path / f"{date}.png")
        tab.set_input_files(f"#{date} input[type=file]", tmp_path / f"{date}.png")
        tab.wait_for_selector(f"#{date} img")
    tab.click("#describe")
    tab.wait_for_selector("text=3,000 x 2,000 px")
    shoot(tab, "refused")
    assert "will be told here" in tab.inner_text("#sentence")


EVIL = "<img src=x onerror='window.hit=1'> ${window.hit=2} {{value}} <b>bold</b>"


class Evil(Describer):
    """Writes markup."""

    def describe_pairs(self, pairs, regions=False):
        return [replace(report, caption=EVIL) for report in super().describe_pairs(pairs, regions)]


def test_a_sentence_never_becomes_markup(chromium, detector, tmp_path):
    with serve_page(detector, tmp_path / "page", Evil) as client:
        page = chromium.new_page()
        page.set_default_timeout(WAIT)
        page.goto(client.address)
        page.click("#example-hall_")
        page.wait_for_selector(".sentence")
        page.wait_for_timeout(500)
        assert page.inner_text(".sentence") == EVIL and page.evaluate("window.hit") is None
        assert page.locator(".sentence *").count() == 0
        page.close()
