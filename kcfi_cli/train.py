"""`kcfi train`: its options are the fields of recipes, so `kcfi.training.train` parses them, and `--help`, itself."""

import argparse

from kcfi_cli.options import Commands


def add_parser(commands: Commands) -> None:
    """The name of `kcfi train`."""
    parser = commands.add_parser("train", help="train from a recipe: `kcfi train --help`", add_help=False)
    parser.set_defaults(run=run, takes_more=True)


def run(options: argparse.Namespace) -> None:
    """`kcfi train`."""
    from kcfi.training.train import main

    main(options.more)
