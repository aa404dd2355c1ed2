"""The grammar: what a question asks for, and that nothing is answered which was not asked."""

import re

import pytest

from kcfi.processing import InputError
from kcfi.scenes.questions import EXAMPLES, Limit, Question, parse
from tests.kcfi.scenes.conftest import LABELS

LABELS = list(LABELS.values())
ALL = ("building", "road")
NEW, GONE = ("appeared",), ("removed",)


def over(field, value, **more):
    return (field, value, float("inf"), more.get("open", True))


def under(field, value, **more):
    return (field, float("-inf"), value, more.get("open", True))


QUESTIONS = {
    "how many buildings appeared in the north-east?": Question("count", ("building",), NEW, "north-east"),
    "How many houses were built in the northeast": Question("count", ("building",), NEW, "north-east"),
    "How many new villas are there in the north eastern part of the scene?": Question(
        "count", ("building",), NEW, "north-east"
    ),
    "Count the changes.": Question("count"),
    "number of demolished halls": Question("count", ("building",), GONE),
    "What is the number of new streets?": Question("count", ("road",), NEW),
    "How many of the roads have disappeared on the west side?": Question("count", ("road",), GONE, "west"),
    "How many buildings and roads appeared?": Question("count", ALL, NEW),
    "How many houses appeared or disappeared?": Question("count", ("building",), ("appeared", "removed")),
    "Did anything change?": Question("yes/no"),
    "Has anything changed in the centre?": Question("yes/no", place="centre"),
    "did any building appear": Question("yes/no", ("building",), NEW),
    "Are there new roads in the middle?": Question("yes/no", ("road",), NEW, "centre"),
    "Were any houses torn down in the southern part?": Question("yes/no", ("building",), GONE, "south"),
    "Did any of the houses in the north-west change?": Question("yes/no", ("building",), place="north-west"),
    "Are there any building changes?": Question("yes/no", ("building",)),
    "Is there any change to the roads?": Question("yes/no", ("road",)),
    "any new construction in the south-east?": Question("yes/no", (), NEW, "south-east"),
    "What is the total area of new buildings?": Question("area", ("building",), NEW),
    "How large are the changes in the east?": Question("area", place="east"),
    "how many hectares of roads were removed": Question("area", ("road",), GONE),
    "How many square metres of buildings were demolished between the two dates?": Question(
        "area", ("building",), GONE
    ),
    "How much area changed?": Question("area"),
    "Where did roads appear?": Question("where", ("road",), NEW),
    "Where is the largest change?": Question("where", order=("area", 1)),
    "Where are the 3 smallest new buildings?": Question("where", ("building",), NEW, order=("-area", 3)),
    "What changed?": Question("what"),
    "What happened in the south-west?": Question("what", place="south-west"),
    "Which buildings were removed?": Question("what", ("building",), GONE),
    "List the new buildings in the whole scene": Question("what", ("building",), NEW),
    "show me the most certain change": Question("what", order=("probability", 1)),
    "Which is the least likely new road?": Question("what", ("road",), NEW, order=("-probability", 1)),
    "What happened at 117.305, 31.212?": Question("what", at=(117.305, 31.212)),
    "What happened here: (-71.5; -33.25)?": Question("what", at=(-71.5, -33.25)),
    "What changed in the box [400000 3499900 400100 3500000]": Question("what", at=(400000, 3499900, 400100, 3500000)),
    "Did any building appear in 117.30, 31.20, 117.31, 31.22?": Question(
        "yes/no", ("building",), NEW, at=(117.30, 31.20, 117.31, 31.22)
    ),
}


@pytest.mark.parametrize("text", QUESTIONS)
def test_a_question_asks_for_what_it_says(text):
    assert parse(text, LABELS) == QUESTIONS[text]


LIMITS = {
    "How many changes are larger than 500 m2?": [over("area_m2", 500)],
    "How many changes with an area of at least 1,500.5 m²": [over("area_m2", 1500.5, open=False)],
    "Are there changes over 2 ha?": [over("area_m2", 20_000)],
    "Are there changes > .5 hectares": [over("area_m2", 5000)],
    "Which changes are smaller than 100 square metres?": [under("area_m2", 100)],
    "Which changes of up to 1 km2 appeared?": [under("area_m2", 1_000_000, open=False)],
    "How many changes below 400 px": [under("pixels", 400)],
    "How many changes have a probability above 0.8?": [over("probability", 0.8)],
    "How many changes with confidence of at least 80 %?": [over("probability", 0.8, open=False)],
    "Which changes are more than 90% certain?": [over("probability", 0.9)],
    "What changed with a certainty below 60 percent": [under("probability", 0.6)],
    "Which changes are larger than 500 m2 and smaller than 1 ha?": [over("area_m2", 500), under("area_m2", 10_000)],
    "Which changes larger than 500 m2 appeared with a probability above 0.8?": [
        over("area_m2", 500),
        over("probability", 0.8),
    ],
}


@pytest.mark.parametrize("text", LIMITS)
def test_a_bound_has_its_unit_and_says_whether_it_counts_itself(text):
    found = [(limit.field, limit.low, limit.high, limit.open) for limit in parse(text, LABELS).limits]
    assert found == [(field, pytest.approx(low), pytest.approx(high), open) for field, low, high, open in LIMITS[text]]


REFUSED = {
    # words without a meaning here are named
    "How many trees were cut?": r"trees, cut\.",
    "How many buildings did not change?": r"not\.",
    "Is nothing new in the north?": r"nothing\.",
    "How many buildings appeared except in the north?": r"except",
    "Which changes are without roads?": r"without",
    "How many buildings appeared in 2019?": r"in, 2019",
    "How many changes are larger than 500?": r"larger, than, 500",
    "How many buildings appeared south of the road?": r"south, of",
    "How many buildings appeared along the new road?": r"along",
    "How many buildings appeared in the northern half?": r"half",
    "How many buildings appeared and how many disappeared?": r"how",
    "Are all changes buildings?": r"all",
    "Which changes are between 100 and 500 m2?": r"between, 100, 500, m2",
    "How many buildings appeared in the north-east of Paris?": r"of, paris",
    # how it begins
    "Why did the houses disappear?": r"how it begins \('why did'\)",
    "Buildings?": r"how it begins \('buildings'\)",
    "": r"how it begins \(''\)",
    # more than one thing at a time
    "How many changes in the north and in the south?": "more than one place",
    "Where is the largest and the smallest change?": "more than one place or order",
    "Did buildings appear and roads disappear?": "what 'and' or 'or' joins",
    "Are there new demolished houses?": "what 'and' or 'or' joins",
    "How many changes are larger than 500 m2 or in the north?": "what 'and' or 'or' joins",
    "Which houses or roads are larger than 500 m2 or have changed?": "what 'and' or 'or' joins",
    "How many buildings and changes?": "what 'and' or 'or' joins",
    "How many buildings appeared or changed?": "changed, which every change has, beside appeared",
    "Did any building change or disappear?": "changed, which every change has, beside removed",
    "Did any road change to a building?": r"to\.",
    "Are buildings larger than roads?": r"larger, than\.",
    "Was the largest building demolished?": "what one certain change is",
    "Are there no changes in the north?": r"no\.",
    "Is the largest change a building?": "what one certain change is",
    "Is the change in the north a road?": "what one certain change is",
    "How many of the largest changes are new?": "what one certain change is",
    # places
    "What happened here?": "'here' without a point",
    "What happened at 1, 2, 3?": "neither a point",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_understood_is_said_with_examples(text):
    with pytest.raises(InputError, match=REFUSED[text]) as refusal:
        parse(text, LABELS)
    assert str(refusal.value).startswith(f"Not understood in {text!r}: ")
    assert all(example in str(refusal.value) for example in EXAMPLES)


@pytest.mark.parametrize(
    "text", ["How many buildings are there?", "Where are the roads?", "Are there houses in the east?"]
)
def test_what_is_there_is_not_what_changed(text):
    with pytest.raises(InputError, match="asks what is there; a report knows what appeared, was removed, or changed"):
        parse(text, LABELS)


def test_a_class_that_the_mask_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(InputError, match="no class 'building'; its classes: change, solar panel"):
        parse("How many houses appeared?", ["change", "solar panel"])
    assert parse("How many solar panels appeared?", ["change", "solar panel"]).labels == ("solar panel",)
    assert parse("How many changes are new?", ["change"]) == Question("count", (), NEW)


def test_a_probability_beyond_one_is_refused():
    for text in ("Which changes have a probability above 80?", "Which changes are over 120% certain?"):
        with pytest.raises(InputError, match="a probability lies between 0 and 1, or between 0 % and 100 %"):
            parse(text, LABELS)


@pytest.mark.parametrize("text", EXAMPLES)
def test_the_examples_of_the_messages_are_understood(text):
    assert parse(text, LABELS).type in ("yes/no", "count", "area", "where", "what")


def test_the_examples_have_every_type():
    assert {parse(text, LABELS).type for text in EXAMPLES} == {"yes/no", "count", "area", "where", "what"}


@pytest.mark.parametrize("word", ["north", "north-west", "northwestern", "north western", "NORTH-WEST"])
def test_directions_are_read_however_they_are_written(word):
    expected = "north" if word == "north" else "north-west"
    assert parse(f"How many changes in the {word}?", LABELS).place == expected


def test_the_words_of_a_bound_are_kept_for_the_answer():
    [limit] = parse("Which changes are larger than 500 m2?", LABELS).limits
    assert limit == Limit("area_m2", low=500.0, words=limit.words) and re.search("larger than 500 m2", limit.words)
