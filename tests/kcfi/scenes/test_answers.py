"""Questions to a report of five known changes, and the numbers that prove the answers."""

import json
import re
import shlex
from pathlib import Path

import pytest

from kcfi.processing import InputError
from kcfi.scenes.answers import ask
from kcfi.scenes.questions import EXAMPLES, parse
from kcfi.scenes.writers import write_findings
from kcfi_cli import main
from tests.kcfi.scenes.conftest import make_findings, make_grid, town, write_work

# Question: value, ids. The five changes, with area and probability:
# 1 building appeared, north-east, 2,400 m2, 0.95; 2 building appeared, north-west, 1,500 m2, 0.85; 3 road appeared,
# centre, 750 m2, 0.7; 4 building removed, south-east, 500 m2, 0.6; 5 building changed, north-east, 100 m2, 0.5
ANSWERS = {
    "How many buildings appeared in the north-east?": (1, [1]),
    "How many buildings changed in the north-east?": (2, [1, 5]),
    "How many houses were built?": (2, [1, 2]),
    "How many changes are in the north?": (3, [1, 2, 5]),
    "How many changes in the eastern third?": (3, [1, 4, 5]),
    "How many new roads are in the centre?": (1, [3]),
    "How many streets disappeared?": (0, []),
    "How many changes?": (5, [1, 2, 3, 4, 5]),
    "How many changes are larger than 500 m2?": (3, [1, 2, 3]),
    "How many changes have at least 500 m2?": (4, [1, 2, 3, 4]),
    "How many changes are smaller than 0.05 ha?": (1, [5]),
    "How many buildings appeared with a probability above 0.9?": (1, [1]),
    "How many changes with a confidence of at most 60%?": (2, [4, 5]),
    "Did anything change?": (True, [1, 2, 3, 4, 5]),
    "Was any building demolished?": (True, [4]),
    "Did any road appear in the south?": (False, []),
    "Are there new buildings over 1 ha?": (False, []),
    "What is the area of new buildings?": (3900.0, [1, 2]),
    "How many hectares of roads were added?": (750.0, [3]),
    "How large is the area of the roads that were removed?": (0, []),
    "Where did buildings appear?": ({"north-east": 1, "north-west": 1}, [1, 2]),
    "Where is the largest change?": ({"north-east": 1}, [1]),
    "Where are the 2 smallest changes?": ({"north-east": 1, "south-east": 1}, [5, 4]),
    "Where were roads removed?": ({}, []),
    "What happened in the south-east?": ({4: "A building has removed in the south-east."}, [4]),
    "Which is the least certain new building?": ({2: "A building has appeared in the north-west."}, [2]),
    "What happened at 400250, 3499970?": ({1: "A building has appeared in the north-east."}, [1]),
    "What happened at 115.94815, 31.63057?": ({1: "A building has appeared in the north-east."}, [1]),
    "What happened at 400250, 3499900?": ({}, []),
    "What happened in 400200, 3499930, 400300, 3500000?": (
        {1: "A building has appeared in the north-east.", 5: "A building has changed in the north-east."},
        [1, 5],
    ),
    "How many buildings appeared in 115.9455, 31.6300, 115.9464, 31.6309?": (1, [2]),
}


@pytest.mark.parametrize("question", ANSWERS)
def test_answers_are_those_of_the_polygons(report, question):
    answer = ask(report, question)
    assert (answer.value, answer.ids) == ANSWERS[question]
    areas = {1: 2400.0, 2: 1500.0, 3: 750.0, 4: 500.0, 5: 100.0}
    assert answer.size["count"] == len(answer.ids) and answer.size["area_m2"] == sum(areas[one] for one in answer.ids)


TEXTS = {
    "How many buildings appeared in the north?": [
        "2: 2 changes (1, 2), 3,900 m².",
        "Sought: class building, kind appeared, in the north (north-west, north-east, north).",
        "88.9% of the scene was seen at every date; nothing is known of the rest.",
        "1 change (5) would fit, but the sentence does not say which way.",
    ],
    "Was any road removed?": [
        "No.",
        "Sought: class road, kind removed.",
        "88.9% of the scene was seen at every date; nothing is known of the rest.",
    ],
    "Where is the largest change?": [
        "north-east: 1",
        "  1: building appeared, north-east, 2,400 m², probability 0.95: at 400250, 3499970 (EPSG:32650)",
        "Sought: every class, every kind, the largest of these.",
        "88.9% of the scene was seen at every date; nothing is known of the rest.",
    ],
    "What happened at 400250, 3499970?": [
        "1 change (1), 2,400 m²",
        "  1: building appeared, north-east, 2,400 m², probability 0.95: A building has appeared in the north-east.",
        "Sought: every class, every kind, point 400250.0, 3499970.0 (EPSG:32650).",
    ],
    "What happened at 400250, 3499900?": [
        "Nothing.",
        "Sought: every class, every kind, point 400250.0, 3499900.0 (EPSG:32650).",
        "The nearest change of any class and kind is 5, 40 m away.",
    ],
    "What is the area of new roads?": [
        "750 m²: 1 change (3).",
        "Sought: class road, kind appeared.",
        "88.9% of the scene was seen at every date; nothing is known of the rest.",
    ],
}


@pytest.mark.parametrize("question", TEXTS)
def test_the_words_of_an_answer_name_what_was_sought_and_what_proves_it(report, question):
    assert ask(report, question).text.splitlines() == TEXTS[question]


@pytest.mark.parametrize(
    ("place", "seen"),
    [
        ("400250, 3499780", "0.0% of this point"),  # row 440 of 450, the first without data is 400
        ("400250, 3499775", "0.0% of this point"),  # on the lower edge
        ("400000, 3499775, 400100, 3499825", "50.0% of this box"),
        ("399000, 3499825, 400100, 3501000", None),  # reaches beyond the scene, and is seen as far as that reaches
        ("400000, 3500000", None),  # the corner
    ],
)
def test_what_no_date_shows_is_not_called_unchanged(report, place, seen):
    notes = ask(report, f"Did anything change at {place}?").notes
    assert any(note.startswith(f"{seen} was seen at every date") for note in notes) == (seen is not None)
    assert seen or not any("seen at every date" in note for note in notes)


def test_a_place_outside_of_the_scene_is_refused_with_its_bounds(report):
    for place in ("500000, 3499900", "31.63057, 115.94815", "7, 47"):
        with pytest.raises(
            InputError, match=r"outside of the scene, which reaches from 400000 to 400300 and from 3499775"
        ):
            ask(report, f"What happened at {place}?")


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A report of plain images: seven changes in pixels."""
    folder = tmp_path_factory.mktemp("pixels")
    findings = town(7, make_grid(crs=None))
    write_findings(findings, write_work(findings, folder / "work"), folder / "report")
    return folder / "report"


def test_plain_images_are_asked_in_pixels(pixels):
    findings = town(7, make_grid(crs=None))
    largest = findings.changes[0]
    assert ask(pixels, "What is the area of the changes?").value == sum(one.pixels for one in findings.changes)
    assert ask(pixels, f"How many changes have at least {largest.pixels} px?").ids == [1]
    left, top, right, bottom = largest.box
    answer = ask(pixels, f"What happened at {(left + right) // 2}, {(top + bottom) // 2}?")
    assert answer.ids == [1] and "(pixels)" in answer.text and answer.size["area_m2"] is None
    assert ask(pixels, "What happened at 590, 440?").text.endswith(" px away.")
    assert ask(pixels, "What is the area of the removed roads?").text.startswith("0 px.")
    with pytest.raises(InputError, match="have no CRS, so areas are in pixels: ask for 'larger than 500 px'"):
        ask(pixels, "How many changes are larger than 500 m2?")


def test_an_empty_report_has_answers(tmp_path):
    findings = make_findings()
    write_findings(findings, write_work(findings, tmp_path / "work"), tmp_path / "report")
    expected = {
        "Did anything change?": False,
        "How many buildings appeared?": 0,
        "What is the area of the changes?": 0,
        "Where did roads appear?": {},
        "What happened at 400010, 3499990?": {},
        "Where is the largest change?": {},
    }
    for question, value in expected.items():
        answer = ask(tmp_path / "report", question)
        assert (answer.value, answer.ids) == (value, []) and "Sought: " in answer.text and answer.notes == []


def test_many_changes_are_counted_all_and_listed_in_part(tmp_path):
    findings = town(60)
    write_findings(findings, write_work(findings, tmp_path / "work"), tmp_path / "report")
    answer = ask(tmp_path / "report", "What changed?")
    assert len(answer.ids) == len(answer.value) == 60 and "  and 40 more" in answer.text.splitlines()
    assert answer.text.startswith("60 changes (1, 2, 3,") and len(answer.text.splitlines()) == 23
    counted = ask(tmp_path / "report", "How many buildings were removed?")
    assert counted.value == sum(one.label == "building" and one.kind == "removed" for one in findings.changes)


# What docs/scenes.md shows

PAGE = (Path(__file__).parents[3] / "docs/scenes.md").read_text(encoding="utf-8")


def test_the_command_of_the_page_prints_what_it_shows(capsys, report, monkeypatch):
    monkeypatch.chdir(report.parent)
    [(command, shown)] = re.findall(r"^\$ kcfi (ask .*)\n((?:.+\n)+?)```", PAGE, re.M)
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == shown


def test_the_questions_of_the_page_are_understood():
    rows = re.findall(r"^\| (yes or no|count|area|where|what) \| .* \| (.+\?) \|$", PAGE, re.M)
    assert {kind.replace("yes or no", "yes/no"): text for kind, text in rows} == {
        parse(text, ["road", "building"]).type: text for text in EXAMPLES[:5]
    }


def test_the_python_of_the_page_runs(capsys, report, monkeypatch):
    monkeypatch.chdir(report.parent)
    [code] = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "kcfi.scenes.answers" in code]
    exec(compile(code, "scenes.md", "exec"), {})
    assert capsys.readouterr().out == "{'north-east': 1}\n"


# The command


def test_the_command_prints_the_answer_or_all_of_it_as_json(capsys, report):
    assert main(["ask", str(report), "how many buildings appeared in the north-east?"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "1: 1 change (1), 2,400 m²."
    assert main(["ask", str(report), "how many buildings appeared in the north-east?", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["type"], answer["value"], answer["ids"]) == ("count", 1, [1])
    assert answer["size"] == {"count": 1, "pixels": 9600, "area_m2": 2400.0, "area_ha": 0.24}
    assert answer["sought"] == "class building, kind appeared, in the north-east" and len(answer["notes"]) == 2


def test_the_command_refuses_in_one_line(capsys, report, tmp_path):
    for folder, question, said in (
        (report, "how many trees?", "kcfi: error: Not understood in 'how many trees?': trees."),
        (tmp_path, "did anything change?", f"kcfi: error: {tmp_path}: no summary.json, so no report; "),
        (tmp_path / "nowhere", "did anything change?", f"kcfi: error: {tmp_path / 'nowhere'}: No such file"),
    ):
        assert main(["ask", str(folder), question]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith(said) and printed.err.count("\n") == 1
