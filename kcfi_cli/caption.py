"""`kcfi caption`: what changed between two images, or in many pairs."""

import argparse
import json
from pathlib import Path
from typing import Any

from kcfi_cli.lists import add_list_options, describer_settings, is_list, run_list
from kcfi_cli.options import Commands, UsageError, add_model_options, add_speed_option, check_writable


def add_parser(commands: Commands) -> None:
    """The parser of `kcfi caption`."""
    parser = commands.add_parser(
        "caption",
        usage="kcfi caption BEFORE AFTER [options]\n       kcfi caption MANIFEST [options]",
        help="describe a pair of images, or many",
        description="Describe what changed between two co-registered images, and write a mask and an overlay.\n"
        "Of two folders, or a manifest, write a table too (parquet files, captions.csv): a second call does what is "
        "missing, and\nthe exit code is 1 if a pair could not be read.",
        epilog="examples:\n  kcfi caption before.png after.png --heatmap --output report\n"
        "  kcfi caption LEVIR-CC/images/test/A LEVIR-CC/images/test/B --output report\n"
        "  kcfi caption pairs.parquet --output report --engine ray --workers 8 --block 1000 --no_pictures",
    )
    parser.add_argument(
        "before",
        type=Path,
        metavar="BEFORE",
        help="image of the earlier date, a folder of them, or MANIFEST: a CSV or parquet file with columns before, "
        "after (paths or URLs) and maybe name, or a STAC collection whose items have the assets before and after",
    )
    parser.add_argument(
        "after",
        type=Path,
        nargs="?",
        metavar="AFTER",
        help="image of the later date, of the same size; or the folder of the images with the same names",
    )
    add_model_options(parser)
    add_speed_option(parser)
    parser.add_argument("--output", default="kcfi-output", type=Path, help="folder for the pictures (%(default)s)")
    parser.add_argument(
        "--bands",
        type=int,
        nargs=3,
        metavar=("R", "G", "B"),
        help="which bands of the files are red, green and blue, counted from 1; needed of four bands, for example",
    )
    parser.add_argument(
        "--stretch",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="percentiles that become black and white, as 2 98: needed of 16 bits and of most floats. Each band of "
        "each image gets its own",
    )
    parser.add_argument(
        "--max_image_pixels", type=int, metavar="N", help="read files of up to so many pixels (178956970)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=8, help="pairs or tiles at a time (%(default)s); CPUs encode 2"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="let torch.compile translate the writing of sentences, which stay the same: meant for large language "
        "models beside a GPU, where it was not tried (on a CPU kcfi-tiny gains nothing)",
    )
    parser.add_argument(
        "--alarm_rate",
        type=float,
        metavar="SHARE",
        help="call at most this share of unchanged pairs (of large images: tiles) changed, as 0.01; needs a model "
        "that `kcfi calibrate` has seen",
    )
    parser.add_argument("--regions", action="store_true", help="also write a sentence per changed region")
    parser.add_argument("--heatmap", action="store_true", help="also draw the strength of the key change features")
    parser.add_argument("--json", action="store_true", help="print one JSON object (per pair)")
    add_list_options(parser, block=16)
    parser.add_argument("--no_pictures", action="store_true", help="of a list of pairs: write the table alone")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`kcfi caption`; the exit code is 1 if pairs of a list could not be read."""
    many = is_list(options.before, options.after)
    if options.no_pictures and (options.heatmap or not many):
        raise UsageError("--no_pictures is for lists of pairs, without --heatmap.")
    for path in filter(None, (options.before, options.after)):
        path.stat()  # not there: said before anything heavy is imported
    check_writable(options.output)
    from transformers.utils.logging import disable_progress_bar

    from kcfi.models import build_describer
    from kcfi.pictures import save_pictures
    from kcfi.processing.reading_kcfi import read_pair

    disable_progress_bar()  # of loading weights, which is over before it can be read
    if many:
        asked = {"regions": options.regions, "heatmap": options.heatmap, "pictures": not options.no_pictures}
        return run_list(options, {"describer": describer_settings(options), "reading": reading(options), **asked})
    describer = build_describer(**describer_settings(options))
    before, after = read_pair(options.before, options.after, **describer.reading(**reading(options)))
    [report] = describer.describe_pairs([(before, after)], options.regions)
    options.output.mkdir(parents=True, exist_ok=True)
    classes = describer.model.config.num_change_classes
    files = save_pictures(report, after, options.output, options.after.stem, classes, options.heatmap)

    if options.json:
        result = {
            "caption": report.caption,
            "caption_box": report.caption_box,
            "score": report.score,
            "changed_fraction": report.changed_fraction,
            "changed_probability": report.changed_probability,
            "mask": None,
            "overlay": None,
            **files,
            "model": options.model,
        }
        if options.regions:
            result["regions"] = [vars(region) for region in report.regions]
        print(json.dumps(result))
        return 0
    print(report.caption)
    if report.caption_box != (0, 0, *after.size):
        left, top, right, bottom = report.caption_box
        print(f"described: x {left}-{right}, y {top}-{bottom}, which changed most")
    if report.changed_fraction is not None:
        print(f"changed: {report.changed_fraction:.1%} of the area (probability {report.changed_probability:.0%})")
    for region in report.regions:
        left, top, right, bottom = region.box
        print(f"  x {left}-{right}, y {top}-{bottom} ({region.pixels} px, {region.probability:.0%}): {region.caption}")
    for kind, path in files.items():
        print(f"{kind}: {path}")
    return 0


def reading(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of `read_pair` that were given."""
    settings = {name: getattr(options, name) for name in ("bands", "stretch", "max_image_pixels")}
    return {name: value for name, value in settings.items() if value is not None}
