"""What the parsers of the commands share: their class, options of several commands, checks of `--output`."""

import argparse
import math
import os
from pathlib import Path
from typing import Any, NoReturn, TypeAlias


class UsageError(Exception):
    """A command line that cannot be run: the bad input that is found before anything heavy is imported."""


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` where argparse would print its usage and exit; no abbreviated options."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Called by argparse with what is wrong."""
        raise UsageError(f"{message} (see `{self.prog} --help`)")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"  # what `add_parser` of a command adds to


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """The option of commands that load a model."""
    parser.add_argument("--model", default="kcfi-tiny", help="folder or Hub id (default: the embedded kcfi-tiny)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that describe pairs: which model, where and how it computes, what it is asked."""
    add_model_option(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the first GPU, else the CPU)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights (default: as they were saved on CUDA, else float32). bfloat16 is faster on CPUs that "
        "have it in hardware; sentences may differ",
    )
    parser.add_argument("--instruction", help="what the model is asked (default: the first of the paper's Table I)")
    parser.add_argument(
        "--tile",
        type=int,
        help="side in px of the images that the model was trained on, and of the squares that larger ones are cut "
        "into (default: as saved with the model)",
    )


def add_limit_options(parser: argparse.ArgumentParser) -> None:
    """The options of servers: what they refuse."""
    parser.add_argument(
        "--max_megabytes", type=float, default=64, metavar="N", help="of what is sent at once (%(default)s)"
    )
    parser.add_argument("--max_megapixels", type=float, default=5, metavar="N", help="of an image (%(default)s)")
    parser.add_argument("--max_waiting", type=int, default=8, metavar="N", help="runs that may wait (%(default)s)")
    parser.add_argument(
        "--max_seconds", type=float, default=180, metavar="N", help="that a run may take (%(default)s)"
    )


def limits_given(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_limit_options`, as fields of `RequestLimits`.

    Raises:
        UsageError: one that is not above 0, or without end.
    """
    given = {name: getattr(options, f"max_{name}") for name in ("megabytes", "megapixels", "waiting", "seconds")}
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise UsageError(f"--max_{name} {value:g} must be above 0 and finite.")
    return given


def add_speed_option(parser: argparse.ArgumentParser) -> None:
    """The option of commands that describe many pairs or tiles."""
    parser.add_argument(
        "--speed",
        choices=["auto", "plain", "exact", "bf16"],
        default="auto",
        help="what runs the vision tower on a CPU: plain = torch; exact = OpenVINO, equal up to rounding and faster "
        'after a start (pip install "kcfi[fast]"); bf16 = OpenVINO in bf16, where sentences may differ; auto = exact '
        "for many pairs or tiles, else plain (%(default)s)",
    )


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that draw synthetic pairs with real materials."""
    parser.add_argument("--materials", help="library of `kcfi data materials`: draw with real ground and roofs")
    parser.add_argument(
        "--pair_mix",
        help='weights of the kinds of synthetic pairs, as JSON: \'{"drawn": 1, "composed": 1, "single_date": 1, '
        '"developed": 1}\' '
        "(default: all alike with --materials, only drawn without)",
    )


def add_meteor_option(parser: argparse.ArgumentParser) -> None:
    """The option of commands that score captions."""
    parser.add_argument("--no-meteor", action="store_true", help="do without Java, METEOR and S_m*")


def check_writable(folder: Path, option: str = "--output") -> None:
    """Refuse a folder, given by an option, that cannot be written, or created, before the work is done.

    Raises:
        UsageError: a file stands in its place or above it, or the rights are missing.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(f"{option}: {existing} is a file; give a folder, or a path below one.")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"{option}: {existing} is not writable; choose another folder.")


def check_results_file(path: Path, example: str = "results.json") -> None:
    """Refuse a file of results that cannot be written; `example` is a name for the message.

    Raises:
        UsageError: it is a folder, or `check_writable` refuses its folder.
    """
    if path.is_dir():
        raise UsageError(f"--output: {path} is a folder; give a file, for example {path / example}.")
    check_writable(path.parent)
