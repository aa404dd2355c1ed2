"""The command `kcfi`: a file per command, with `add_parser` and `run`, which imports what is heavy.

It stands outside of the package `kcfi`, whose import registers the Auto classes and so imports torch and transformers.
"""

import argparse
import sys
from collections.abc import Sequence

from kcfi_cli import ablate, ask, calibrate, caption, data, demo, evaluate, export, push, scene, score, serve, train
from kcfi_cli.options import Parser, UsageError

# as `kcfi --help` lists them
COMMANDS = (caption, scene, ask, demo, train, evaluate, calibrate, score, ablate, data, push, serve, export)

EXAMPLES = """examples:
  kcfi caption before.png after.png                        sentence, mask and overlay by the embedded model
  kcfi caption images/A images/B --output report           every pair of two folders, into report/captions.csv
  kcfi caption before.tif after.tif --regions --json       also a sentence per changed region; all as JSON
  kcfi scene before.tif after.tif -o report                changes of a scene of any size, as polygons on the map
  kcfi ask report "how many buildings appeared?"           of a report of `kcfi scene`; no model guesses
  kcfi demo                                                a page in the browser: two images in, a sentence out
  kcfi data synthesize --pairs 100 --output pairs          drawn pairs in the layout of LEVIR-MCI
  kcfi data check LEVIR-MCI                                every problem of a data set, and what its splits hold
  kcfi train debug                                         train for two minutes on drawn pairs
  kcfi train paper --dataset LEVIR-MCI --output_dir runs/paper
  kcfi evaluate --model runs/paper --dataset LEVIR-MCI --split test --output runs/paper/results.json
  kcfi score predictions.json --references LevirCCcaptions.json --split test --output scores.json
  kcfi ablate ablations --dataset LEVIR-MCI                the paper's tables, trained, scored and set beside the paper
  kcfi push runs/paper me/kcfi-levir --dry-run card        what would go to the Hub, with a card of the run
  kcfi serve --model runs/paper --port 8001                captions over HTTP, as OpenAI's chat completions
  kcfi export --model runs/paper --output detector.onnx    the mask alone, for onnxruntime
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0; 1 for a data set with problems (`kcfi data check`), runs that failed (`kcfi ablate`) or pairs
        of a list that could not be read (`kcfi caption`); 2 behind one line on stderr, for bad input or losses that
        are not finite; 130 on Ctrl-C.

    Raises:
        Exception: any other error is a bug; a note under its traceback says what a report needs.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser()
        options, more = parser.parse_known_args(arguments)
        if more and not options.takes_more:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        options.more = more
        return options.run(options) or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not is_input_error(error):
            error.add_note(bug_note(arguments))
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:  # without the number in front
            text = f"{error.filename}: {error.strerror}"
        print(f"kcfi: error: {' '.join([*text.split(), *getattr(error, '__notes__', [])])}", file=sys.stderr)
        return 2


def is_input_error(error: Exception) -> bool:
    """Whether an error tells of what the user gave (options, files, the Hub, settings), and not of a bug."""
    if isinstance(error, OSError):  # but a file that an installed package misses is not the user's
        return "site-packages" not in str(error.filename)
    if isinstance(error, UsageError | FloatingPointError):
        return True
    processing = sys.modules.get("kcfi.processing")  # not loaded: then nothing can have raised its error
    return processing is not None and isinstance(error, processing.InputError)


def bug_note(arguments: Sequence[str]) -> str:
    """What stands under the traceback of an error that is not about the input."""
    import platform
    import shlex
    from importlib.metadata import version

    return (
        "This looks like a bug of kcfi, not like bad input. Please report it as an issue of the repository that kcfi "
        "came from (its CONTRIBUTING.md says how), with this traceback and: kcfi "
        f"{version('kcfi')}, Python {platform.python_version()}, transformers {version('transformers')}, "
        f"command line: {shlex.join(['kcfi', *arguments])}"
    )


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = Parser(
        prog="kcfi",
        description="Remote sensing image change captioning: what changed between two dates, and where.",
        epilog=EXAMPLES,
    )
    parser.set_defaults(takes_more=False)  # `train`, `ablate` and `serve` hand further options on
    commands = parser.add_subparsers(metavar="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
