"""`kcfi demo`: a page in the browser."""

import argparse

from kcfi_cli.caption import build_describer
from kcfi_cli.options import Commands, UsageError, add_model_options

LIMITS = {  # default, help
    "megabytes": (64, "of uploaded files, at once"),
    "megapixels": (9, "of an image, and of a scene on the model's grid"),
    "waiting": (8, "runs that may wait"),
    "seconds": (120, "that a run may take"),
}


def add_parser(commands: Commands) -> None:
    """The parser of `kcfi demo`."""
    parser = commands.add_parser(
        "demo",
        help="look at it in a browser",
        description="Serve a page for two images, or two GeoTIFFs: the sentence, the mask with a threshold to move, "
        "everything as a zip.\nIt reads uploads alone, fetches nothing, and tells nobody. "
        'Needs `pip install "kcfi[demo]"`.',
        epilog="example: kcfi demo --model runs/paper --port 8080",
    )
    add_model_options(parser)
    parser.add_argument("--batch_size", type=int, default=8, help="tiles at a time (%(default)s); CPUs encode 2")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine alone; 0.0.0.0: all)"
    )
    parser.add_argument("--port", type=int, default=7860, help="port (%(default)s; 0: one that is free)")
    for name, (default, text) in LIMITS.items():
        parser.add_argument(f"--max_{name}", type=float, default=default, metavar="N", help=f"{text} (%(default)s)")
    parser.set_defaults(run=run, compile=False, alarm_rate=None)


def run(options: argparse.Namespace) -> None:
    """`kcfi demo`."""
    limits = {name: getattr(options, f"max_{name}") for name in LIMITS}
    for name, value in limits.items():
        if not value > 0:
            raise UsageError(f"--max_{name} {value:g} must be above 0.")
    from transformers.utils.logging import disable_progress_bar

    from kcfi.demo.limits import Limits
    from kcfi.demo.server import serve

    disable_progress_bar()  # of loading weights, which is over before it can be read
    serve(build_describer(options), options.model, options.host, options.port, Limits(**limits))
