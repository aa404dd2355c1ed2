"""`kcfi data`: data sets are made and checked."""

import argparse
from pathlib import Path
from typing import Any

from kcfi_cli.options import Commands, add_drawing_options, check_writable


def add_parser(commands: Commands) -> None:
    """The parsers of `kcfi data` and of its actions."""
    actions = commands.add_parser("data", help="make and check data sets").add_subparsers(
        metavar="action", required=True
    )
    for add_action in (add_synthesize, add_check, add_convert, add_materials):
        add_action(actions)


def add_synthesize(actions: Commands) -> None:
    """The parser of `kcfi data synthesize`."""
    parser = actions.add_parser(
        "synthesize",
        help="draw synthetic pairs",
        description="Draw before/after pairs with masks and captions, in the folder layout of LEVIR-MCI, or as "
        "parquet shards to train on.",
        epilog="example: kcfi data synthesize --pairs 100 --output pairs",
    )
    parser.add_argument("--pairs", type=int, required=True, help="number of pairs; 80 %% train, 10 %% val, 10 %% test")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (%(default)s)")
    parser.add_argument(
        "--shards", action="store_true", help="write parquet shards, for --dataset, instead of a folder of images"
    )
    add_drawing_options(parser)
    parser.set_defaults(run=run_synthesize)


def run_synthesize(options: argparse.Namespace) -> None:
    """`kcfi data synthesize`."""
    from kcfi.files import as_dict
    from kcfi.training.synthetic.dataset import synthesize, synthesize_shards

    check_writable(options.output)
    drawn: Any = {"materials": options.materials, "pair_mix": as_dict(options.pair_mix)}
    if options.shards:
        synthesize_shards(options.output, options.pairs, options.seed, **drawn)
        print(f"{options.output}: train on it with `kcfi train RECIPE --dataset {options.output}`")
        return
    synthesize(options.output, options.pairs, options.seed, **drawn)
    print(f"{options.pairs} pairs: {options.output}, with a picture of some: {options.output / 'contact_sheet.png'}")


def add_check(actions: Commands) -> None:
    """The parser of `kcfi data check`."""
    parser = actions.add_parser(
        "check",
        help="find what is wrong with a folder",
        description="Read every file of a LEVIR-CC, LEVIR-MCI or LEVIR-CD folder, or every row of a folder that "
        "`datasets` opens, print each problem and what each split holds. The exit code is 1 if there are problems.",
        epilog="example: kcfi data check LEVIR-MCI",
    )
    parser.add_argument("root", type=Path, help="LEVIR-CC / LEVIR-MCI folder, or folder of shards or other rows")
    parser.add_argument("--columns", help='what the columns of rows are called, as JSON: \'{"image_before": "A"}\'')
    parser.set_defaults(run=run_check)


def run_check(options: argparse.Namespace) -> int:
    """`kcfi data check`; returns its exit code."""
    from kcfi.files import as_dict
    from kcfi.training.data.check import check_folder, counts_table

    problems, counts = check_folder(options.root, as_dict(options.columns))
    for problem in problems:
        print(problem)
    print(counts_table(counts))
    disagreeing = sum(count.disagreeing for count in counts.values())
    print(f"pairs whose changeflag and mask disagree: {disagreeing} (both are kept)")
    print(f"problems: {len(problems)}")
    return 1 if problems else 0


def add_convert(actions: Commands) -> None:
    """The parser of `kcfi data convert`."""
    parser = actions.add_parser(
        "convert",
        help="write parquet shards",
        description="Copy LEVIR-CC or LEVIR-MCI into parquet shards with a dataset card; train on them by "
        "--dataset SHARDS, or upload them to the Hub. Images are copied as they are: run `kcfi data check` first.",
        epilog="example: kcfi data convert LEVIR-MCI --output shards",
    )
    parser.add_argument("root", type=Path, help="LEVIR-CC / LEVIR-MCI folder, or an archive of one (zip, tar)")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.set_defaults(run=run_convert)


def run_convert(options: argparse.Namespace) -> None:
    """`kcfi data convert`."""
    from datasets import disable_progress_bars

    from kcfi.training.data.shards import write_shards

    disable_progress_bars()  # one per shard; ours counts pairs
    check_writable(options.output)
    write_shards(options.root, options.output)
    print(f"{options.output}: train on it with `kcfi train RECIPE --dataset {options.output}`")


def add_materials(actions: Commands) -> None:
    """The parser of `kcfi data materials`."""
    parser = actions.add_parser(
        "materials",
        help="cut a library of real surfaces and roofs",
        description="Turn folders of single-date aerial images into a library of ground, roofs and places, which "
        "pairs are drawn with. Each folder is described by its source.yaml.",
        epilog="example: kcfi data materials --source my_town --output library",
    )
    parser.add_argument("--source", type=Path, nargs="+", required=True, metavar="DIR", help="folders")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.set_defaults(run=run_materials)


def run_materials(options: argparse.Namespace) -> None:
    """`kcfi data materials`."""
    from kcfi.training.materials.cut import write_library

    check_writable(options.output)
    counts = write_library(options.source, options.output)
    print(", ".join(f"{kind}: {count}" for kind, count in counts.items()))
    print(f"{options.output}: look at {options.output / 'contact_sheet.png'}")
