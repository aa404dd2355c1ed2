"""`kcfi ablate`: a set of recipes, trained and scored."""

import argparse
from pathlib import Path

from kcfi_cli.options import Commands, add_meteor_option, check_writable


def add_parser(commands: Commands) -> None:
    """The parser of `kcfi ablate`."""
    parser = commands.add_parser(
        "ablate",
        usage="kcfi ablate SET [--output DIR] [--rows ROW ...] [--seeds N ...] [--processes N] [--no-meteor] "
        "[--field value ...]",
        help="train and score a set of recipes",
        description="Train every recipe of a set with several seeds, score each (on the test split, unless the set "
        "says otherwise), and write table.md, table.csv and chart.png.\n"
        "Fields after the options go to every recipe. A second call does what is "
        "missing; the exit code is 1 if a run failed.",
        epilog="example: kcfi ablate ablations --rows baseline cfe --seeds 0 1 --dataset LEVIR-MCI",
    )
    parser.add_argument(
        "set",
        help="YAML file, or a packaged set: ablations, synthetic_ablations, real_ablations, levir_choices, levir_few",
    )
    parser.add_argument("--output", type=Path, help="folder of the runs (runs/SET)")
    parser.add_argument("--rows", nargs="+", default=[], help="names of the recipes to run (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="those of the set to run now (all)")
    parser.add_argument("--processes", type=int, default=1, help="processes of a training, one per GPU (%(default)s)")
    add_meteor_option(parser)
    parser.set_defaults(run=run, takes_more=True)


def run(options: argparse.Namespace) -> int:
    """`kcfi ablate`; returns its exit code."""
    from kcfi.training.ablate import ablate
    from kcfi.training.ablation_table import read_set
    from kcfi.training.scoring.metrics import require_java

    output = options.output or Path("runs") / Path(options.set).stem
    check_writable(output)
    if not options.no_meteor:
        require_java()  # now, not after a day of training
    plan = read_set(options.set)
    runs = plan.runs(options.rows, options.seeds)
    errors = ablate(plan, runs, output, options.more, not options.no_meteor, options.processes)
    print(f"{output / 'table.md'}, table.csv, chart.png; failed: {len(errors)} of {len(runs)} runs")
    return 1 if errors else 0
