"""`kcfi scene`: what changed between georeferenced images of any size."""

import argparse
from pathlib import Path

from kcfi_cli.lists import add_list_options, describer_settings, is_list, run_list
from kcfi_cli.options import Commands, UsageError, add_model_options, add_speed_option, check_writable

SHOWN = 10  # changes that are printed


def add_parser(commands: Commands) -> None:
    """The parser of `kcfi scene`."""
    parser = commands.add_parser(
        "scene",
        usage="kcfi scene BEFORE AFTER [LATER ...] [options]\n       kcfi scene MANIFEST [options]",
        help="describe the changes of a scene of any size, on a map",
        description="Find what changed between two GeoTIFFs (or plain images) of any size, or more: a sentence, a "
        "polygon, an area\nand a probability per change. Started again after a stop, it goes on where it was.\n"
        "Of two folders, or a manifest, write a report per pair, and a table.\n"
        'Needs `pip install "kcfi[geo]"`.',
        epilog="examples:\n  kcfi scene before.tif after.tif -o report\n"
        "  kcfi scene 2019.tif 2021.tif 2024.tif -o report --acquired 2019-06-01 2021-05-28 2024-05-30\n"
        "  kcfi scene pairs.csv -o reports --engine ray --workers 8",
    )
    parser.add_argument(
        "before", metavar="BEFORE", help="image of the earlier date, a folder of them, or MANIFEST: see `kcfi caption`"
    )
    parser.add_argument("after", metavar="AFTER", nargs="?", help="image of the later date, or the folder of them")
    parser.add_argument("later", metavar="LATER", nargs="*", help="images of still later dates, in order of time")
    parser.add_argument("-o", "--output", default="kcfi-scene", type=Path, help="folder for the results (%(default)s)")
    parser.add_argument("--site", type=Path, metavar="DIR", help="also a folder for any web server: a map to look at")
    add_model_options(parser)
    add_speed_option(parser)
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
        "--nodata",
        type=float,
        metavar="VALUE",
        help="of pixels without data, where the files do not say it: 0 = black",
    )
    parser.add_argument(
        "--min_area", type=float, default=25.0, metavar="M2", help="smallest change in m2 (%(default)s)"
    )
    parser.add_argument("--max_captions", type=int, metavar="N", help="sentences for the N largest changes (all)")
    parser.add_argument(
        "--model_resolution", type=float, metavar="M", help="m per pixel of the training images (as saved)"
    )
    parser.add_argument(
        "--acquired", nargs="+", default=(), metavar="DATE", help="when each image was acquired, as 2024-05-30"
    )
    parser.add_argument(
        "--confirm",
        type=int,
        default=1,
        metavar="N",
        help="of more than two dates: keep a change that so many of the later ones show too (%(default)s)",
    )
    add_list_options(parser, block=1)
    parser.add_argument("--json", action="store_true", help="of a list of pairs: print one JSON object per pair")
    parser.set_defaults(run=run, compile=False, alarm_rate=None)


def run(options: argparse.Namespace) -> int:
    """`kcfi scene`; the exit code is 1 if pairs of a list could not be compared."""
    many = is_list(options.before, options.after)
    if options.later and many:
        raise UsageError("A list has two dates per scene: give two folders, or one manifest.")
    if options.site and many:
        raise UsageError("--site is of one scene: leave it out, and make the sites one by one.")
    check_writable(options.output)
    if options.site:
        check_writable(options.site, "--site")
    from transformers.utils.logging import disable_progress_bar

    from kcfi.models import build_describer
    from kcfi.scenes import describe_scene
    from kcfi.scenes.dates import check_acquired
    from kcfi.scenes.reading import open_raster
    from kcfi.scenes.series import check_confirm

    disable_progress_bar()  # of loading weights, which is over before it can be read
    settings = ("reproject", "align", "bands", "stretch", "nodata", "min_area", "max_captions", "model_resolution")
    given = {name: getattr(options, name) for name in (*settings, "acquired", "confirm")}
    dates = [options.before, options.after, *options.later]
    check_acquired(options.acquired, len(dates))
    check_confirm(options.confirm, len(dates))
    if many:
        return run_list(options, {"describer": describer_settings(options), "scene": given})
    for path in dates:
        open_raster(path).close()  # what cannot be read is said before the model is loaded
    if options.site:
        from kcfi.scenes.site import check_site, write_site

        check_site(options.site, options.output, dates)
    found = describe_scene(dates, options.output, build_describer(**describer_settings(options)), **given)
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
    if options.site:
        page = write_site(options.output, dates, options.site)
        print(f"site: {page} (a web server shows it: `python -m http.server -d {options.site}`)")
    return 0
