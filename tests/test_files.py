"""JSON and YAML files, names in messages, new folders."""

import gzip

import pytest

from kcfi.files import as_dict, check_names, check_new_folder, move_into_place, name_some, read_json, read_yaml
from kcfi.processing import InputError


def test_json_is_read_plain_or_gzipped(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1]}')
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'{"a": [1]}'))
    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "a.json.gz") == {"a": [1]}
    with pytest.raises(FileNotFoundError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "a": 2}', "a occurs more than once"),
        (b"{", "not readable as JSON"),
        (b"\xff", "not readable as JSON"),
    ],
)
def test_json_that_cannot_be_meant_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "a.json")


def test_a_field_without_a_value_is_refused_unless_it_may_have_none(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: 1\nb:\n")
    with pytest.raises(InputError, match="b has no value"):
        read_yaml(file)
    assert read_yaml(file, ["b"]) == read_yaml(file, optional=None) == {"a": 1, "b": None}


def test_text_that_is_no_dictionary_is_refused():
    assert as_dict('{"a": 1}') == as_dict("a: 1") == as_dict({"a": 1}) == {"a": 1} and as_dict(None) == {}
    with pytest.raises(ValueError, match="'cross' is not a dictionary"):
        as_dict("cross")
    with pytest.raises(InputError, match="neither JSON nor YAML"):
        as_dict("{")


def test_an_unknown_name_is_refused_with_the_nearest_or_with_all():
    check_names(["rate"], ["rate", "seed"], "field")
    with pytest.raises(InputError, match=r"Unknown field 'rte': did you mean 'rate'\?"):
        check_names(["rate", "rte"], ["rate", "seed"], "field")
    with pytest.raises(InputError, match="known: rate, seed"):
        check_names(["xyz"], ["seed", "rate"], "field")


def test_many_names_are_counted():
    assert name_some("cab") == "a, b, c" and name_some("abcdefg", limit=2) == "a, b and 5 more"


def test_nothing_is_written_over(tmp_path):
    made, output = tmp_path / "made", tmp_path / "output"
    made.mkdir()
    (made / "file").touch()
    output.mkdir()
    check_new_folder(output)
    move_into_place(made, output)
    assert (output / "file").is_file() and not made.exists()
    for taken in (output, output / "file"):
        with pytest.raises(FileExistsError, match="choose a new one"):
            check_new_folder(taken)


def nested(levels):
    return "[" * levels + "]" * levels


def test_json_that_no_memory_or_stack_holds_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text(nested(100_000))
    with pytest.raises(InputError, match=r"deep\.json: not readable as JSON .*RecursionError"):
        read_json(tmp_path / "deep.json")
    with gzip.open(tmp_path / "bomb.json.gz", "wb") as file:
        for _ in range(65):
            file.write(b" " * 2**20)
    assert (tmp_path / "bomb.json.gz").stat().st_size < 2**17
    with pytest.raises(InputError, match=r"bomb\.json\.gz: more than 64 MiB come out of it"):
        read_json(tmp_path / "bomb.json.gz")


def test_half_a_character_is_no_json_but_both_halves_are_one(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "\\ud83c"}')
    with pytest.raises(InputError, match=r"a\.json: not readable as JSON .*surrogates not allowed"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": "\\ud83c\\udfe0"}')
    assert read_json(tmp_path / "a.json") == {"a": "\N{HOUSE BUILDING}"}


def test_yaml_may_refer_to_a_value_but_not_multiply_it_without_end(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: &one [1, 2]\nb: *one\n")
    assert read_yaml(file) == {"a": [1, 2], "b": [1, 2]}
    bomb = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]
    for text in ("\n".join(bomb), "a: &a [*a]", f"a: {nested(5_000)}"):
        file.write_text(text)
        with pytest.raises(InputError, match="is not a YAML file"):
            read_yaml(file)
    file.write_text("1: 2\n")
    with pytest.raises(InputError, match="1 is no name of a field"):
        read_yaml(file)
