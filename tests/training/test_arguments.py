import pytest
import yaml

from kcfi.files import as_dict
from kcfi.training.arguments import packaged_recipes, parse_recipe


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"output_dir: {tmp_path / 'run'}\nlearning_rate: 1e-3\nuse_cpu: true\nlog_level: error\n"
        "model_settings:\n  flow_residual: cross\n  vision_feature_layers: [1, 2]\n"
    )
    return path


def test_defaults_are_the_papers(recipe):
    training = parse_recipe(recipe, ["--learning_rate", "1e-4"]).training
    assert (training.learning_rate, training.vision_learning_rate, training.projector_learning_rate) == (
        1e-4,
        1e-5,
        1e-5,
    )
    assert (training.weight_decay, training.warmup_steps, training.num_train_epochs) == (5e-4, 0.03, 50)
    assert (training.per_device_train_batch_size, training.lr_scheduler_type) == (32, "cosine")
    assert (training.dwa, training.dwa_temperature) == ("step", 0.2)
    assert training.get_warmup_steps(1000) == 30


def test_all_captions_of_a_pair_stand_behind_one_prefix_unless_a_recipe_says_otherwise(recipe):
    assert parse_recipe(recipe).data.captions_per_pair == 5
    assert parse_recipe(recipe, ["--captions_per_pair", "1"]).data.captions_per_pair == 1


def test_options_of_the_command_line_replace_those_of_the_file(recipe):
    assert parse_recipe(recipe).training.learning_rate == 1e-3
    assert parse_recipe(recipe, ["--learning-rate=2e-5"]).training.learning_rate == 2e-5
    options = ["--dwa", "none", "--num_train_pairs", "7", "--bf16", "false", "--max_steps", "-1", "--tf32", "false"]
    parsed = parse_recipe(recipe, options)
    assert (parsed.training.dwa, parsed.data.num_train_pairs, parsed.training.max_steps) == ("none", 7, -1)


def test_one_entry_of_a_dictionary_is_replaced_and_the_others_stay(recipe):
    parsed = parse_recipe(
        recipe, ["--model_settings.flow_residual", "self", "--model_settings.num_change_classes", "3"]
    )
    expected = {"flow_residual": "self", "vision_feature_layers": [1, 2], "num_change_classes": 3}
    assert as_dict(parsed.model.model_settings) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rat", "1"], "Unknown field 'learning_rat': did you mean 'learning_rate'"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--dwa", "always"], "invalid choice: 'always'"),
        (["--dwa_temperature", "0"], "dwa_temperature=0.0 must be above 0"),
        (["--dwa_window", "0"], "dwa_window=0 must be at least 1"),
        (
            ["--bf16_language_model", "--train_language_model"],
            "bf16_language_model: .* leave out train_language_model",
        ),
        (["--activation_checkpointing_towers", "vision"], "changes nothing without `activation_checkpointing: true`"),
        (["learning_rate", "1"], "Unexpected 'learning_rate'"),
    ],
)
def test_bad_options_are_refused_with_what_would_be_right(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(recipe, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dwa_temperatur: 2.0", "did you mean 'dwa_temperature'"),
        ("- learning_rate", "`field: value` lines, but holds a list"),
        ("a: [1", "is not a YAML file"),
        ("seed:", "seed has no value"),
    ],
)
def test_bad_recipes_are_refused_with_what_would_be_right(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_recipe(path)


@pytest.fixture
def write(tmp_path):
    """Write a recipe, by its path below a folder."""

    def write_text(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write_text


def test_a_recipe_replaces_values_of_its_base_and_single_model_settings(write, recipe):
    half = write("more/half.yaml", "base: ../recipe.yaml\nseed: 3\nmodel_settings:\n  flow_residual: self\n")
    row = write("more/row.yaml", "base: half.yaml\nlearning_rate: 2e-3\nmodel_settings:\n  num_change_classes: 3\n")
    parsed = parse_recipe(row, ["--seed", "4"])
    assert parsed.model.model_settings == {
        "flow_residual": "self",
        "vision_feature_layers": [1, 2],
        "num_change_classes": 3,
    }
    assert (parsed.training.learning_rate, parsed.training.seed) == (2e-3, 4)
    assert (parse_recipe(half).training.learning_rate, parse_recipe(half).training.seed) == (1e-3, 3)
    assert parse_recipe(recipe).training.seed == 42
    assert parsed.values["output_dir"] == parse_recipe(recipe).values["output_dir"] and "base" not in parsed.values


def test_a_base_may_be_a_packaged_recipe(write):
    parsed = parse_recipe(write("mine.yaml", "base: debug\nnum_train_pairs: 2\n"), ["--use_cpu"])
    assert (parsed.model.model, parsed.data.num_train_pairs, parsed.data.num_eval_pairs) == ("kcfi-tiny", 2, 16)


def test_the_file_beside_a_recipe_is_its_base_wherever_it_is_read_from(write, monkeypatch, tmp_path):
    write("there/base.yaml", "output_dir: run\nseed: 1\nuse_cpu: true\n")
    write("here/base.yaml", "output_dir: run\nseed: 2\nuse_cpu: true\n")
    row = write("there/row.yaml", "base: base.yaml\n")
    monkeypatch.chdir(tmp_path / "here")
    assert parse_recipe(row).training.seed == 1


def test_bad_bases_are_refused(write):
    one, two = write("one.yaml", "base: two.yaml\nseed: 1\n"), write("two.yaml", "base: one.yaml\n")
    with pytest.raises(ValueError, match=f"each other's base: {one} -> {two} -> {one}"):
        parse_recipe(one)
    with pytest.raises(ValueError, match=r"No recipe papr: did you mean 'paper'. .*debug, .*paper, .*released"):
        parse_recipe(write("three.yaml", "base: papr\n"))
    with pytest.raises(ValueError, match=r"empty\.yaml: seed has no value"):
        write("empty.yaml", "seed:\n")
        parse_recipe(write("four.yaml", "base: empty.yaml\n"))


def test_null_switches_off_what_a_base_has_set(write):
    options = "use_cpu: true\noutput_dir: run\n"
    write("base.yaml", f"{options}materials: library\nmodel_settings:\n  flow_residual: self\nsave_total_limit: 5\n")
    row = write("row.yaml", "base: base.yaml\nmaterials: null\nmodel_settings: null\nsave_total_limit: null\n")
    parsed = parse_recipe(row)
    assert (parsed.data.materials, parsed.model.model_settings) == (None, {})
    assert parsed.training.save_total_limit is None  # not the default, 2
    assert "materials" not in parsed.values and parsed.values["save_total_limit"] is None
    again = parse_recipe(write("again.yaml", yaml.safe_dump(parsed.values)))
    assert again.training.save_total_limit is None and again.values == parsed.values
    off = parse_recipe(write("more.yaml", f"{options}materials: library\n"), ["--materials", "null"])
    assert off.data.materials is None


def test_null_is_refused_where_there_must_be_a_value(recipe):
    with pytest.raises(ValueError, match="invalid float value: 'null'"):
        parse_recipe(recipe, ["--learning_rate", "null"])


@pytest.mark.parametrize("share", ["-0.1", "1"])
def test_a_share_of_unreadable_pairs_is_at_least_0_and_below_1(recipe, share):
    with pytest.raises(ValueError, match=r"max_unreadable=.* must be at least 0 and below 1"):
        parse_recipe(recipe, [f"--max_unreadable={share}"])


def test_an_unknown_recipe_lists_the_packaged_ones():
    with pytest.raises(ValueError, match=r"No recipe papr: did you mean 'paper'. .*debug, .*paper, .*released"):
        parse_recipe("papr")


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_parse_and_their_settings_are_known(name, tmp_path):
    from kcfi import KCFIConfig

    parsed = parse_recipe(name, ["--output_dir", str(tmp_path), "--bf16", "false"])
    assert set(as_dict(parsed.model.model_settings)) <= set(KCFIConfig().to_dict())


def test_the_values_of_a_recipe_parse_to_the_same_arguments(recipe, tmp_path):
    parsed = parse_recipe(
        recipe, ["--dwa", "window", "--model_settings.flow_residual", "self", "--label_names", "labels"]
    )
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(parsed.values))
    again = parse_recipe(tmp_path / "again.yaml")
    assert again.data == parsed.data
    assert again.values == parsed.values
    assert as_dict(again.model.model_settings) == as_dict(parsed.model.model_settings)
    for name in parsed.values.keys() & vars(parsed.training).keys():
        assert getattr(again.training, name) == getattr(parsed.training, name)
