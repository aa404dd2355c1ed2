"""Lists of pairs, of images (`kcfi caption`) or of scenes (`kcfi scene`): their options, and what is printed."""

import argparse
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from kcfi_cli.options import Parser, UsageError, check_writable

MANIFESTS = {".csv", ".parquet", ".json"}
SHOWN = 5  # reasons of failure that are printed


def add_list_options(parser: Parser, block: int) -> None:
    """The options of lists of pairs; `block` is the default of `--block`."""
    group = parser.add_argument_group("of a list of pairs", "two folders, or a manifest (.csv, .parquet, STAC .json)")
    group.add_argument(
        "--engine",
        choices=["local", "accelerate", "ray"],
        default="local",
        help='this process, several of this machine, or a cluster (pip install "kcfi[ray]"); the rows are the same',
    )
    group.add_argument("--workers", type=int, metavar="N", help="processes, or actors of Ray (one per GPU, or one)")
    group.add_argument("--address", help="of a Ray cluster (RAY_ADDRESS, or else Ray starts here)")
    group.add_argument(
        "--block",
        type=int,
        default=block,
        metavar="ROWS",
        help="pairs per file of the table: what is lost by a stop (%(default)s)",
    )
    group.add_argument("--retry", action="store_true", help="do pairs again that ended with an error")


def is_list(before: str | Path, after: str | Path | None) -> bool:
    """Whether two folders or a manifest are given, and no images.

    Raises:
        UsageError: the later image is missing.
    """
    manifest = after is None and Path(before).suffix.lower() in MANIFESTS
    if after is None and not manifest:
        kinds = ", ".join(sorted(MANIFESTS))
        raise UsageError(f"Give the later image too, or a manifest ({kinds}) in place of {before}.")
    return manifest or Path(before).is_dir()


def run_list(options: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Describe a list of pairs; the exit code is 1 if some failed.

    Args:
        options: of the command; those of `add_list_options` among them.
        settings: of `kcfi.archives.job.Job`.
    """
    from tqdm import tqdm

    from kcfi.archives.blocks import TABLE
    from kcfi.archives.job import Job
    from kcfi.archives.pairs import find_pairs
    from kcfi.archives.run import COVERAGE, describe_archive
    from kcfi.files import read_json

    pairs = find_pairs(options.before, options.after)
    check_writable(options.output)
    engine = {name: getattr(options, name) for name in ("engine", "workers", "address", "block", "retry")}
    blocks = describe_archive(pairs, options.output, Job(**settings), **engine)
    try:
        with closing(blocks), tqdm(total=len(pairs), desc="pairs", unit="pair", delay=0.5) as progress:
            for rows in blocks:
                for row in rows:
                    tqdm.write(json.dumps(row) if options.json else f"{row['name']}: {row['error'] or _summary(row)}")
                progress.update(len(rows))
    except KeyboardInterrupt:
        if (options.output / TABLE).exists():
            stopped = f"Stopped. What is finished stands in {options.output / TABLE}; the same command does the rest."
            print(stopped, file=sys.stderr)
        raise
    covered = read_json(options.output / COVERAGE)
    if not options.json:
        print(f"{covered['done']} of {covered['pairs']} pairs: {options.output / TABLE}")
        print(
            f"{covered['failed']} failed, {covered['skipped']} were there; "
            f"{covered['seconds']:.1f} s, {covered['rows_per_second']:.2f} pairs/s"
        )
        for reason, count in list(covered["reasons"].items())[:SHOWN]:
            print(f"  {count}: {reason}")
    return 1 if covered["failed"] else 0


def _summary(row: dict[str, Any]) -> str:
    """A row that was described, for people."""
    if row.get("changes") is not None:
        return f"{row['caption']} ({row['report']})"
    changed = row["changed_fraction"]
    return row["caption"] + ("" if changed is None else f" ({changed:.1%})")


def describer_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `kcfi.models.build_describer`."""
    names = ("model", "device", "dtype", "tile", "batch_size", "instruction", "alarm_rate")
    return {name: getattr(options, name) for name in names} | {"compiled": options.compile, "speed": options.speed}
