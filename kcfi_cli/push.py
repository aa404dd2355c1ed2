"""`kcfi push`: a run goes to the Hub."""

import argparse
from pathlib import Path

from kcfi_cli.options import Commands


def add_parser(commands: Commands) -> None:
    """The parser of `kcfi push`."""
    parser = commands.add_parser(
        "push",
        help="put a run on the Hub",
        description="Upload weights, code, processor and a generated model card of a finished run to the Hugging Face "
        "Hub (log in with `hf auth login`).\nCall it from where the run was trained: a tower whose name is no folder "
        "here stands in the card as a model of the Hub.",
        epilog="example: kcfi push runs/paper me/kcfi-levir --dry-run card",
    )
    parser.add_argument("folder", type=Path, help="output_dir of `kcfi train`")
    parser.add_argument("repo_id", help="owner/name on the Hub; created if missing")
    parser.add_argument(
        "--results",
        type=Path,
        help="results file of `kcfi evaluate`; pairs.png beside it is uploaded too (default: results.json of FOLDER)",
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--license",
        metavar="NAME",
        help="licence of the weights, as the Hub calls it (default: that of the towers, where their cards agree)",
    )
    parser.add_argument("--dry-run", type=Path, metavar="DIR", help="write what would be uploaded into a new folder")
    parser.add_argument(
        "--text-model",
        metavar="ID",
        help="Hub id of the language model, if it was kept frozen: its weights are left out, and fetched from there "
        "whenever the model is loaded (default: they are uploaded)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`kcfi push`."""
    from kcfi.training.sharing.export import push

    what = (options.folder, options.repo_id, options.results)
    print(push(*what, options.private, options.license, options.dry_run, options.text_model))
