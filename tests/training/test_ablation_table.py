"""The table of an ablation: what its cells say of scores made up here."""

import csv
import json

import pytest
import yaml
from PIL import Image

from kcfi.training.ablation_table import Cell, compare, read_set, verdict_on, write_tables


@pytest.fixture
def folder(tmp_path):
    """A set of two groups over two recipes, a.yaml and b.yaml."""
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text("dataset: synthetic\n")
    rows = [
        {"group": "Table X", "label": "first", "recipe": "a.yaml", "paper": {"cider_d": 100.0}},
        {"group": "Table X", "label": "with <b>", "recipe": "b.yaml", "paper": {"cider_d": 120.5}},
        {"group": "Fig. Y", "label": "alone", "recipe": "b.yaml"},
    ]
    values = {"title": "Trial", "dataset": "LEVIR-CC", "seeds": [0, 1, 2], "rows": rows}
    (tmp_path / "set.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def write_results(folder, run, cider_d, **scores):
    captions = {"bleu_4": 50.0, "meteor": None, "cider_d": cider_d, "s_m": None, **scores}
    report = {
        "dataset": "/data/LEVIR-MCI",
        "split": "test",
        "pairs": {"all": 7},
        "captions": {"all": captions, "changed": {"cider_d": None}},
        "change_accuracy": 90.0,
    }
    (folder / run).mkdir()
    (folder / run / "results.json").write_text(json.dumps(report))


def table(folder):
    lines = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_cells_hold_mean_spread_the_papers_score_and_whether_the_difference_is_clear(folder):
    plan = read_set(folder / "set.yaml")
    for seed, (first, second) in enumerate([(10, 12), (20, 22.5), (30, 31.5)]):
        write_results(folder, f"a-{seed}", first, bleu_4=50.0)
        write_results(folder, f"b-{seed}", second, bleu_4=50.0 + 5 * (seed == 1))
    write_tables(plan, folder, {})
    assert table(folder) == [
        ["", "", "BLEU-4", "CIDEr-D", "change accuracy"],
        ["---", "---", "---", "---", "---"],
        ["Table X", "first", "50.00 ± 0.00", "20.00 ± 10.00 [100.00]", "90.00 ± 0.00"],
        [
            "Table X",
            "with &lt;b&gt;",
            "51.67 ± 2.89<br>+1.67 *inconclusive*",
            "22.00 ± 9.76 [120.50]<br>+2.00",
            "90.00 ± 0.00<br>+0.00 *inconclusive*",
        ],
        ["Fig. Y", "alone", "51.67 ± 2.89", "22.00 ± 9.76", "90.00 ± 0.00"],
    ]
    title, _, legend, *_ = (folder / "table.md").read_text().splitlines()
    assert title == "# Trial: LEVIR-MCI (test, 7 pairs), seeds 0, 1, 2"
    assert "the paper's score, on LEVIR-CC." in legend
    with (folder / "table.csv").open() as file:
        rows = {(row["row"], row["metric"]): row for row in csv.DictReader(file)}
    row = rows["with <b>", "cider_d"]
    assert [row[name] for name in ("seeds", "mean", "paper", "difference", "verdict")] == [
        "3",
        "22.0000",
        "120.5000",
        "2.0000",
        "higher",
    ]
    assert row["title"] == title[2:] and rows["first", "cider_d"]["verdict"] == ""
    assert rows["with <b>", "bleu_4"]["verdict"] == "inconclusive"
    assert Image.open(folder / "chart.png").width == 900


def test_failed_and_missing_runs_stand_in_the_table(folder):
    plan = read_set(folder / "set.yaml")
    write_results(folder, "a-0", 10)
    write_tables(plan, folder, {"b-0": "exit code 1: ValueError: a | b", "b-1": "exit code -9: no output"})
    _, _, first, second, _ = table(folder)
    assert first[:2] == ["Table X", "first (1 of 3 seeds)"] and first[3] == "10.00 [100.00]"
    assert second[1] == (
        "with &lt;b&gt; (0 of 3 seeds)<br>seed 0 failed: exit code 1: ValueError: a \\| b"
        "<br>seed 1 failed: exit code -9: no output"
    )
    assert second[2:] == ["-", "- [120.50]", "-"]


def test_a_table_without_results_names_no_data_set(folder):
    write_tables(read_set(folder / "set.yaml"), folder, {})
    assert (folder / "table.md").read_text().startswith("# Trial: no results yet, seeds 0, 1, 2\n")
    assert table(folder)[2] == ["Table X", "first (0 of 3 seeds)", "- [100.00]"]


@pytest.mark.parametrize(
    ("ours", "first", "expected"),
    [
        ({0: 3.0}, {}, Cell(3.0, None, None, "")),
        ({0: 3.0}, {0: 1.0}, Cell(3.0, None, 2.0, "inconclusive")),  # one seed
        ({0: 1.0, 1: 3.0}, {0: 0.0, 2: 5.0}, Cell(2.0, 2**0.5, 1.0, "inconclusive")),  # one seed in common
        ({0: 0.0, 1: 9.0}, {0: 1.0, 1: 10.0}, Cell(4.5, 40.5**0.5, -1.0, "inconclusive")),  # two seeds
        ({0: 0.0, 1: 9.0, 2: 0.0}, {0: 1.0, 1: 10.0, 2: 1.0}, Cell(3.0, 27**0.5, -1.0, "lower")),  # paired
        ({}, {0: 1.0}, Cell(None, None, None, "")),
    ],
)
def test_differences_are_paired_by_seed(ours, first, expected):
    assert vars(compare(ours, first)) == pytest.approx(vars(expected))


def test_recipes_of_several_rows_run_once_per_seed_and_rows_and_seeds_can_be_chosen(folder):
    plan = read_set(folder / "set.yaml")
    assert list(plan.runs()) == ["a-0", "b-0", "a-1", "b-1", "a-2", "b-2"]
    assert list(plan.runs(rows=["b"], seeds=[2])) == ["b-2"]
    with pytest.raises(ValueError, match="Unknown row of Trial 'c'"):
        plan.runs(rows=["c"])
    with pytest.raises(ValueError, match="Unknown seed of Trial '5': known: 0, 1, 2"):
        plan.runs(seeds=[5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tilte": "x"}, "Unknown field of .*set.yaml 'tilte': did you mean 'title'"),
        ({"rows": [{"group": "X", "recipe": "a.yaml"}]}, "a row of .*set.yaml: label missing"),
        ({"split": "vall"}, "Unknown split in .*set.yaml 'vall': did you mean 'val'"),
        ({"rows": ["a.yaml"]}, "must hold `field: value` lines, but is 'a.yaml'"),
        ({"rows": [{"group": "X", "label": "x", "recipe": "c.yaml"}]}, "No recipe c.yaml"),
        (
            {"rows": [{"group": "X", "label": "x", "recipe": "a.yaml", "paper": {"cider": 1.0}}]},
            "Unknown score in .*set.yaml 'cider': did you mean 'cider_d'",
        ),
        (
            {"rows": [{"group": "X", "label": "x", "recipe": "a.yaml", "claim": "better"}]},
            "Unknown claim in .*set.yaml 'better'",
        ),
    ],
)
def test_bad_sets_are_refused_with_what_would_be_right(folder, change, message):
    path = folder / "set.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_set(path)


def test_two_recipes_of_one_name_are_refused(folder):
    (folder / "debug.yaml").write_text("seed: 1\n")
    rows = [{"group": "X", "label": "x", "recipe": name} for name in ("debug", "debug.yaml")]
    path = folder / "set.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "rows": rows}))
    with pytest.raises(ValueError, match="need different file names"):
        read_set(path)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [("higher", "confirmed"), ("lower", "refuted"), ("inconclusive", "undecided"), ("", "")],
)
def test_a_claim_is_confirmed_refuted_or_undecided(found, verdict):
    assert verdict_on("higher", Cell(1.0, 1.0, 1.0, found)) == verdict


def test_claims_stand_in_a_table_of_their_own_beside_what_became_of_them_on_drawn_pairs(folder):
    path = folder / "set.yaml"
    values = yaml.safe_load(path.read_text())
    values["rows"][1] |= {"claim": "higher", "drawn": "refuted"}
    path.write_text(yaml.safe_dump(values))
    plan = read_set(path)
    write_tables(plan, folder, {})
    assert table(folder)[-1] == ["Table X", "with <b>", "higher", "-", "refuted"]
    for seed in range(3):
        write_results(folder, f"a-{seed}", 10.0 + seed)
        write_results(folder, f"b-{seed}", 12.0 + seed)
    write_tables(plan, folder, {})
    assert "by CIDEr-D:" in (folder / "table.md").read_text()
    assert table(folder)[-3:] == [
        ["", "", "the paper", "here", "drawn pairs"],
        ["---", "---", "---", "---", "---"],
        ["Table X", "with <b>", "higher", "confirmed", "refuted"],
    ]
