"""`kcfi score`: the scores of any system's captions."""

import argparse
import json
from pathlib import Path

from kcfi_cli.options import Commands, add_meteor_option, check_results_file


def add_parser(commands: Commands) -> None:
    """The parser of `kcfi score`."""
    parser = commands.add_parser(
        "score",
        help="score any system's captions",
        description="Score a file {filename: caption} against the captions of LEVIR-CC.",
        epilog="example: kcfi score predictions.json --references LevirCCcaptions.json.gz --output scores.json",
    )
    parser.add_argument("predictions", type=Path, help="JSON: {filename: caption}")
    parser.add_argument("--references", required=True, type=Path, help="LevirCCcaptions.json or .json.gz")
    parser.add_argument("--split", default="test", help="train, val or test (%(default)s)")
    parser.add_argument(
        "--profile",
        default="coco",
        choices=["coco", "levir-ids"],
        help="protocol: coco, or levir-ids as RSICCFormer, Chg2Cap, Change-Agent ...: words as numbers (%(default)s)",
    )
    parser.add_argument("--output", type=Path, help="results file (default: print only)")
    add_meteor_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`kcfi score`."""
    from kcfi.training.scoring.metrics import score_file

    if options.output:
        check_results_file(options.output)
    results = score_file(
        options.predictions, options.references, options.split, options.profile, meteor=not options.no_meteor
    )
    text = json.dumps(results, indent=2)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)
