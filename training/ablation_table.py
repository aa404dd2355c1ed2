"""The table of `kcfi ablate`: its rows, which a set file names, and how results.json files fill them."""

import csv
import html
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image

from kcfi.files import check_names, read_json, read_yaml
from kcfi.pictures import Bar, bar_chart
from kcfi.processing import InputError, refusing
from kcfi.training.arguments import RECIPES, SETS, find_recipe
from kcfi.training.scoring.evaluate import flat_scores

METRICS = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "s_m": "S_m*",
    "cider_d_changed": "CIDEr-D of changed pairs",
    "change_accuracy": "change accuracy",
    "mask_f1": "mask F1",
    "mask_mean_iou": "mask mIoU",
}
CLAIMED = ("higher", "lower")  # what the paper may claim of S_m*
SPLITS = ("train", "val", "test")
VERDICTS = ("confirmed", "refuted", "undecided")  # what may become of a claim
RESULTS = "results.json"  # in the folder of a run, once it is scored
LEGEND = (
    "Mean ± standard deviation over the seeds; in brackets the paper's score, on {}. Below it the difference to the "
    "first row of the group, paired by seed: *inconclusive* if it is under two of its standard deviations, or has "
    "fewer than three seeds. Where nothing differs, three seeds still pass by chance in one comparison of 14. S_m* of "
    "all pairs rewards saying of each that nothing changed; change accuracy and scores of changed pairs do not."
)


@dataclass
class Row:
    """A row of the table.

    Args:
        group: table of the paper it belongs to; the first row of a group is what the others are compared with.
        label: what it is.
        recipe: file to train from; in a set file, the name of a packaged recipe or a path from the set's folder.
        paper: the paper's scores, by the names of `METRICS`.
        claim: what the paper says of S_m* beside the first row of the group, "higher" or "lower"; "" = nothing.
        drawn: what became of the claim on drawn pairs: "confirmed", "refuted" or "undecided"; "" = not asked there.
    """

    group: str
    label: str
    recipe: Path
    paper: dict[str, float] = field(default_factory=dict)
    claim: str = ""
    drawn: str = ""


@dataclass
class AblationSet:
    """What a set file holds.

    Args:
        title: of the table.
        dataset: on which the paper's scores were taken.
        seeds: to train every recipe with.
        rows: of the table, group by group; several may show one recipe, which is trained once.
        split: that the runs are scored on; settings are chosen on "val".
    """

    title: str
    dataset: str
    seeds: list[int]
    rows: list[Row]
    split: str = "test"

    def runs(self, rows: Sequence[str] = (), seeds: Sequence[int] = ()) -> dict[str, tuple[Path, int]]:
        """Recipe and seed of every run by the name of its folder; every recipe's first seed comes first.

        Args:
            rows: names of the recipes to choose (none: all), "cfe" for ablations/cfe.yaml.
            seeds: of those of the set, the ones to choose (none: all).

        Raises:
            ValueError: no such row or seed.
        """
        names = {row.recipe.stem: row.recipe for row in self.rows}
        check_names(rows, names, f"row of {self.title}")
        check_names(map(str, seeds), map(str, self.seeds), f"seed of {self.title}")
        chosen = [recipe for name, recipe in names.items() if not rows or name in rows]
        return {run_name(recipe, seed): (recipe, seed) for seed in seeds or self.seeds for recipe in chosen}


def run_name(recipe: Path, seed: int) -> str:
    """Name of the folder of a run, "cfe-0"."""
    return f"{recipe.stem}-{seed}"


@dataclass(frozen=True)
class Cell:
    """One score of one row.

    Args:
        mean, spread: over the seeds; None without a seed, and without two.
        difference: to the first row of the group, mean over the seeds that both have; None with nothing to compare.
        verdict: "higher", "lower" or "inconclusive"; "" with nothing to compare.
    """

    mean: float | None
    spread: float | None
    difference: float | None
    verdict: str


@dataclass(frozen=True)
class Line:
    """A row as it is shown.

    Args:
        row: what it is.
        cells: by the names of `METRICS`.
        finished: number of seeds that have results.
        failed: what went wrong with others, a text per seed.
    """

    row: Row
    cells: dict[str, Cell]
    finished: int
    failed: list[str]


def read_set(name: str | Path) -> AblationSet:
    """Read a set file.

    Args:
        name: YAML file with the fields of `AblationSet`, or the name of a packaged one ("ablations").

    Raises:
        InputError: no such set or recipe, two recipes of one name, or a field that is unknown or missing.
    """
    path = Path(name) if Path(name).is_file() else RECIPES / f"{str(name).removesuffix('.yaml')}.yaml"
    if not path.is_file():
        raise InputError(
            f"No set of recipes {name}: give a YAML file, or one of the packaged sets: {', '.join(SETS)}."
        )
    plan = AblationSet(**_fields(read_yaml(path), AblationSet, str(path)))
    check_names([plan.split], SPLITS, f"split in {path}")
    names: dict[str, Path] = {}
    with refusing(f"{path} is no set of recipes"):
        plan.rows = [Row(**_fields(row, Row, f"a row of {path}")) for row in plan.rows]
        for row in plan.rows:
            check_names(row.paper, METRICS, f"score in {path}")
            check_names([row.claim], ["", *CLAIMED], f"claim in {path}")
            check_names([row.drawn], ["", *VERDICTS], f"verdict in {path}")
            row.recipe = find_recipe(row.recipe, path.parent)
    for row in plan.rows:
        if names.setdefault(row.recipe.stem, row.recipe) != row.recipe:
            raise InputError(f"{path}: {names[row.recipe.stem]} and {row.recipe} need different file names.")
    return plan


def _fields(values: Any, kind: type, what: str) -> dict[str, Any]:
    """The fields of a dataclass as a file gives them: none unknown, and none missing that has no default."""
    if not isinstance(values, dict):
        raise InputError(f"{what} must hold `field: value` lines, but is {values!r}.")
    check_names(values, [entry.name for entry in fields(kind)], f"field of {what}")
    needed = [entry.name for entry in fields(kind) if entry.default is entry.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    if missing:
        raise InputError(f"{what}: {', '.join(missing)} missing.")
    return values


def read_report(folder: Path) -> dict[str, Any]:
    """The results.json of a run."""
    return dict(read_json(folder / RESULTS))


def compare(ours: Mapping[int, float], first: Mapping[int, float]) -> Cell:
    """One score of a row beside that of the first row of its group.

    Args:
        ours: score by seed.
        first: the first row's score by seed; empty for the first row itself.

    Returns:
        Its verdict is "inconclusive" unless the mean of the differences, paired by seed, is at least two of their
        standard deviations; so always with fewer than three seeds.
    """
    values, paired = list(ours.values()), [ours[seed] - first[seed] for seed in ours if seed in first]
    mean = statistics.fmean(values) if values else None
    spread = statistics.stdev(values) if len(values) > 1 else None
    if not paired:
        return Cell(mean, spread, None, "")
    difference = statistics.fmean(paired)
    clear = len(paired) > 2 and difference != 0 and abs(difference) >= 2 * statistics.stdev(paired)
    return Cell(mean, spread, difference, ("higher" if difference > 0 else "lower") if clear else "inconclusive")


def verdict_on(claim: str, cell: Cell) -> str:
    """What the scores make of a claim.

    Args:
        claim: one of `CLAIMED`, of the row beside the first one of its group.
        cell: of the score that the claim is about.

    Returns:
        One of `VERDICTS`; "" where there is nothing to compare yet.
    """
    if not cell.verdict:
        return ""
    if cell.verdict == "inconclusive":
        return "undecided"
    return "confirmed" if cell.verdict == claim else "refuted"


def write_tables(plan: AblationSet, output: Path, errors: Mapping[str, str]) -> None:
    """Write table.md, table.csv (a line per score) and chart.png of the results.json files that are there.

    Args:
        plan: the rows and seeds to show.
        output: folder of the runs.
        errors: last line of the error of the runs that failed, by the name of the run.
    """
    reports = {run: read_report(output / run) for run in plan.runs() if (output / run / RESULTS).exists()}
    scores = {run: flat_scores(report) for run, report in reports.items()}

    def by_seed(recipe: Path, metric: str) -> dict[int, float]:
        found = {seed: scores.get(run_name(recipe, seed), {}) for seed in plan.seeds}
        return {seed: values[metric] for seed, values in found.items() if metric in values}

    lines = []
    first: dict[str, Path] = {}  # recipe of the first row of a group
    for row in plan.rows:
        reference = first.setdefault(row.group, row.recipe)
        cells = {}
        for metric in METRICS:
            beside = {} if row.recipe == reference else by_seed(reference, metric)
            cells[metric] = compare(by_seed(row.recipe, metric), beside)
        runs = {seed: run_name(row.recipe, seed) for seed in plan.seeds}
        failed = [f"seed {seed} failed: {errors[run]}" for seed, run in runs.items() if run in errors]
        lines.append(Line(row, cells, sum(run in reports for run in runs.values()), failed))

    pairs = {run: one["pairs"]["all"] + one.get("pairs_without_captions", 0) for run, one in reports.items()}
    data = {f"{Path(one['dataset']).name} ({one['split']}, {pairs[run]} pairs)" for run, one in reports.items()}
    title = f"{plan.title}: {', '.join(sorted(data)) or 'no results yet'}, seeds {', '.join(map(str, plan.seeds))}"
    (output / "table.md").write_text(f"# {title}\n\n{_markdown(plan, lines)}", encoding="utf-8")
    _write_csv(output / "table.csv", title, lines)
    _chart(plan, title, lines).save(output / "chart.png")


def _markdown(plan: AblationSet, lines: Sequence[Line]) -> str:
    known = {name for line in lines for name, cell in line.cells.items() if cell.mean is not None}
    known |= {name for row in plan.rows for name in row.paper}
    metrics = [name for name in METRICS if name in known]
    table = [["", "", *(METRICS[name] for name in metrics)], ["---"] * (2 + len(metrics))]
    for line in lines:
        seeds = "" if line.finished == len(plan.seeds) else f" ({line.finished} of {len(plan.seeds)} seeds)"
        texts = [html.escape(text, quote=False) for text in (line.row.label + seeds, *line.failed)]
        row = [line.row.group, "<br>".join(texts).replace("|", "\\|")]
        table.append([*row, *(_text(line.cells[name], line.row.paper.get(name)) for name in metrics)])
    return f"{LEGEND.format(plan.dataset)}\n\n{_table(table)}{_claims(lines)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(texts)} |\n" for texts in rows)


def _claims(lines: Sequence[Line]) -> str:
    """A table of the paper's claims and of what became of them here and on drawn pairs; "" without claims."""
    metric = _headline(lines)
    rows = [["", "", "the paper", "here", "drawn pairs"], ["---"] * 5]
    for line in lines:
        row = line.row
        if row.claim:
            verdict = verdict_on(row.claim, line.cells[metric])
            rows.append([row.group, row.label, row.claim, verdict or "-", row.drawn or "-"])
    text = f"\nWhat the paper claims of each row beside the first one of its group, by {METRICS[metric]}:\n\n"
    return text + _table(rows) if len(rows) > 2 else ""


def _headline(lines: Sequence[Line]) -> str:
    """The score that a set is looked at by: S_m*, or CIDEr-D where METEOR was left out."""
    return "s_m" if any(line.cells["s_m"].mean is not None for line in lines) else "cider_d"


def _text(cell: Cell, paper: float | None) -> str:
    """A cell as "22.00 ± 9.76 [120.50]<br>+2.00 *inconclusive*", without what there is not."""
    text = "-" if cell.mean is None else f"{cell.mean:.2f}"
    text += "" if cell.spread is None else f" ± {cell.spread:.2f}"
    text += "" if paper is None else f" [{paper:.2f}]"
    text += "" if cell.difference is None else f"<br>{cell.difference:+.2f}"
    return text + (" *inconclusive*" if cell.verdict == "inconclusive" else "")


def _write_csv(path: Path, title: str, lines: Sequence[Line]) -> None:
    header = ["group", "row", "recipe", "metric", "seeds", "mean", "spread", "paper", "difference", "verdict"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "failures", "title"])
        for line in lines:
            row = line.row
            for name, cell in line.cells.items():
                numbers = (cell.mean, cell.spread, row.paper.get(name), cell.difference)
                texts = ["" if number is None else f"{number:.4f}" for number in numbers]
                about = [row.group, row.label, row.recipe.stem, name, line.finished]
                writer.writerow([*about, *texts, cell.verdict, "; ".join(line.failed), title])


def _chart(plan: AblationSet, title: str, lines: Sequence[Line]) -> Image.Image:
    """Bars of the score of `_headline`."""
    metric = _headline(lines)
    legend = f"{METRICS[metric]}: blue = mean, black = standard deviation, orange = the paper on {plan.dataset}"
    bars = [
        Bar(line.row.group, line.row.label, cell.mean, cell.spread or 0.0, line.row.paper.get(metric))
        for line in lines
        for cell in [line.cells[metric]]
    ]
    return bar_chart(bars, f"{title}\n{legend}")
