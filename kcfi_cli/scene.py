"""`kcfi scene`: what changed between two georeferenced images of any size."""

import argparse
from pathlib import Path

from kcfi_cli.caption import build_describer
from kcfi_cli.options import Commands, add_model_options, check_writable

SHOWN = 10  # changes that are printed


def add_parser(commands: Commands) -> None:
    """The parser of `kcfi scene`."""
    parser = commands.add_parser(
        "scene",
        help="describe the changes of a scene of any size, on a map",
        description="Find what changed between two GeoTIFFs (or plain images) of any size: a sentence, a polygon, an "
        "area and a\nprobability per change. Started again after an interruption, it goes on where it was.\n"
        'Needs `pip install "kcfi[geo]"`.',
        epilog="example:\n  kcfi scene before.tif after.tif -o report",
    )
    parser.add_argument("before", metavar="BEFORE", help="image of the earlier date")
    parser.add_argument("after", metavar="AFTER", help="image of the later date")
    parser.add_argument("-o", "--output", default="kcfi-scene", type=Path, help="folder for the results (%(default)s)")
    add_model_options(parser)
    parser.add_argument("--batch_size", type=int, default=8, help="tiles at a time (%(default)s); CPUs encode 2")
    parser.add_argument("--reproject", action="store_true", help="bring the later date to the earlier one's CRS")
    parser.add_argument("--align", action="store_true", help="take out a constant shift between the dates")
    parser.add_argument(
        "--bands", type=int, nargs=3, metavar=("R", "G", "B"), help="which bands are the colours, counted from 1"
    )
    parser.add_argument(
        "--stretch",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="percentiles of the scene that become black and white (2 98 of other than 8 bits, else none)",
    )
    parser.add_argument(
        "--min_area", type=float, default=25.0, metavar="M2", help="smallest change in m2 (%(default)s)"
    )
    parser.add_argument("--max_captions", type=int, metavar="N", help="sentences for the N largest changes (all)")
    parser.add_argument(
        "--model_resolution", type=float, metavar="M", help="m per pixel of the training images (as saved)"
    )
    parser.add_argument(
        "--acquired", nargs=2, default=(), metavar="DATE", help="when the images were acquired, as 2024-05-30"
    )
    parser.set_defaults(run=run, compile=False, alarm_rate=None)


def run(options: argparse.Namespace) -> None:
    """`kcfi scene`."""
    check_writable(options.output)
    from transformers.utils.logging import disable_progress_bar

    from kcfi.scenes import describe_scene
    from kcfi.scenes.reading import open_raster

    disable_progress_bar()  # of loading weights, which is over before it can be read
    settings = ("reproject", "align", "bands", "stretch", "min_area", "max_captions", "model_resolution", "acquired")
    dates = [options.before, options.after]
    for path in dates:
        open_raster(path).close()  # what cannot be read is said before the model is loaded
    found = describe_scene(
        dates, options.output, build_describer(options), **{name: getattr(options, name) for name in settings}
    )
    print(found.caption)
    for change in found.changes[:SHOWN]:
        size = f"{change.pixels} px" if change.area_m2 is None else f"{change.area_m2:,.0f} m2"
        print(f"  {change.id}: {change.caption} ({size}, probability {change.probability:.2f})")
    if len(found.changes) > SHOWN:
        print(f"  and {len(found.changes) - SHOWN} smaller ones")
    for date in found.dates:
        for note in date.notes:
            print(f"{date.path}: {note}")
    for warning in found.warnings:
        print(f"warning: {warning}")
    print(f"report: {options.output / 'report.html'}")
