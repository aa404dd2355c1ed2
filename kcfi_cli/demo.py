"""`kcfi demo`: a page in the browser."""

import argparse

from kcfi_cli.lists import describer_settings
from kcfi_cli.options import Commands, add_limit_options, add_model_options, add_speed_option, limits_given


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
    add_limit_options(parser)
    parser.set_defaults(run=run, compile=False, alarm_rate=None)


def run(options: argparse.Namespace) -> None:
    """`kcfi demo`."""
    given = limits_given(options)
    from transformers.utils.logging import disable_progress_bar

    from kcfi.demo.limits import Limits
    from kcfi.demo.server import serve
    from kcfi.models import build_describer
    from kcfi.web.memory import keep_arenas_small

    keep_arenas_small()
    disable_progress_bar()  # of loading weights, which is over before it can be read
    limits = Limits(**given, stored_megabytes=max(Limits.stored_megabytes, 8 * given["megabytes"]))
    serve(build_describer(**describer_settings(options)), options.model, options.host, options.port, limits)
