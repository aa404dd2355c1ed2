"""The page of licences is made of what the packages say of themselves."""

from email.message import Message

import pytest

from tests.licences import closure, licence_of, table


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([("License-Expression", "MIT"), ("License", "other")], "MIT"),
        ([("Classifier", "License :: OSI Approved :: BSD License"), ("Classifier", "Topic :: X")], "BSD License"),
        ([("License", "The text\nof a licence")], "The text"),
        ([], "not stated"),
    ],
)
def test_the_most_exact_field_is_taken(fields, said):
    metadata = Message()
    for name, value in fields:
        metadata[name] = value
    assert licence_of(metadata) == said


def test_all_that_is_brought_along_has_a_row_once():
    core = closure("kcfi")
    assert {"torch", "numpy", "transformers", "jinja2"} <= core and "pytest" not in core
    names = [line.split(" | ")[0].removeprefix("| ") for line in table().splitlines()[2:]]
    assert len(names) == len(set(names)) and core <= set(names) and "kcfi" not in names
