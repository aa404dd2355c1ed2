"""`kcfi demo`: a page in the browser."""

import argparse
import math

from kcfi_cli.lists import describer_settings
from kcfi_cli.options import Commands, UsageError, add_model_options, add_speed_option


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
    add_speed_option(parser)
    parser.add_argument("--batch_size", type=int, default=8, help="tiles at a time (%(default)s); CPUs encode 2")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine alone; 0.0.0.0: all)"
    )
    parser.add_argument("--port", type=int, default=7860, help="port (%(default)s; 0: one that is free)")
    parser.add_argument(
        "--max_megabytes", type=float, default=64, metavar="N", help="of uploads, at once (%(default)s)"
    )
    parser.add_argument(
        "--max_megapixels",
        type=float,
        default=5,
        metavar="N",
        help="of an image, and of a scene at the model's m per pixel (%(default)s)",
    )
    parser.add_argument("--max_waiting", type=int, default=8, metavar="N", help="runs that may wait (%(default)s)")
    parser.add_argument(
        "--max_seconds", type=float, default=180, metavar="N", help="that a run may take (%(default)s)"
    )
    parser.set_defaults(run=run, compile=False, alarm_rate=None)


def run(options: argparse.Namespace) -> None:
    """`kcfi demo`."""
    given = {name: getattr(options, f"max_{name}") for name in ("megabytes", "megapixels", "waiting", "seconds")}
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise UsageError(f"--max_{name} {value:g} must be above 0 and finite.")
    from transformers.utils.logging import disable_progress_bar

    from kcfi.demo.limits import Limits
    from kcfi.demo.server import serve
    from kcfi.models import build_describer

    disable_progress_bar()  # of loading weights, which is over before it can be read
    limits = Limits(**given, stored_megabytes=max(Limits.stored_megabytes, 8 * options.max_megabytes))
    serve(build_describer(**describer_settings(options)), options.model, options.host, options.port, limits)
