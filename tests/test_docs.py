"""The pages of docs/ without mkdocs: links lead somewhere, the menu has every page, the API every public name."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import kcfi

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
MENU = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
PUBLIC = {*kcfi.__all__, "ChangeReport", "KCFICollator", "KCFIMetric", "KCFITrainer", "KCFITrainingArguments"}
PUBLIC |= {"DataArguments", "ModelArguments", "load_pairs", "Calibration", "describe_scene", "Findings", "Change"}
NAMES = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links, on GitHub and in the site."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS], ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name}: {link}"
        assert page.parent == ROOT or target.parent == ROOT / "docs", f"{page.name}: {link} is not part of the site"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_menu_has_every_page_once_and_the_index_links_to_all_others():
    named = re.findall(r"^ +- .*?: (\w+\.md)$", MENU, re.M)
    assert sorted(named) == [page.name for page in DOCS]
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert {page.name for page in DOCS} - set(re.findall(r"\]\((\w+\.md)\)", index)) == {"index.md"}


def test_the_api_page_has_every_public_name_where_it_can_be_imported():
    for name in NAMES:
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute).__doc__, name
    assert PUBLIC == {name.rpartition(".")[2] for name in NAMES} and len(NAMES) == len(PUBLIC)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_list_begins_behind_an_empty_line_without_which_the_site_shows_a_paragraph(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for paragraph in re.split(r"\n\n+", text):
        lines = paragraph.strip("\n").splitlines()
        assert not any(line.startswith("- ") for line in lines) or lines[0].startswith("- "), lines[0]
