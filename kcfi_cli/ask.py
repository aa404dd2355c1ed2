"""`kcfi ask`: a question about a report of `kcfi scene`."""

import argparse
import json
from pathlib import Path

from kcfi_cli.options import Commands


def add_parser(commands: Commands) -> None:
    """The parser of `kcfi ask`."""
    parser = commands.add_parser(
        "ask",
        help="answer a question from the polygons of a report",
        description="Answer a question about a report of `kcfi scene` from its polygons: whether, how many, how "
        "large, where, or what.\nNo language model is asked; what is not understood is said.",
        epilog='examples:\n  kcfi ask report "how many buildings appeared in the north-east?"\n'
        '  kcfi ask report "what happened at 117.305, 31.212?" --json',
    )
    parser.add_argument("report", type=Path, metavar="REPORT", help="folder that `kcfi scene` wrote")
    parser.add_argument("question", metavar="QUESTION", help="in English")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`kcfi ask`."""
    options.report.stat()  # not there: said before anything heavy is imported
    from kcfi.scenes.answers import ask

    answer = ask(options.report, options.question)
    print(json.dumps(vars(answer), ensure_ascii=False) if options.json else answer.text)
