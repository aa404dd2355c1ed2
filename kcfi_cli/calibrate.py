"""`kcfi calibrate`: probabilities that mean what they say."""

import argparse
import json

from kcfi_cli.options import Commands


def add_parser(commands: Commands) -> None:
    """The parser of `kcfi calibrate`."""
    parser = commands.add_parser(
        "calibrate",
        help="measure how far a model's probabilities can be believed, and save what mends them",
        description="Fit the temperature of the mask, the probability that a pair changed, and the thresholds of "
        "`kcfi caption --alarm_rate`,\non pairs that the model was not trained on. All is saved in the model's "
        "folder; masks and sentences stay as they are.",
        epilog="example: kcfi calibrate --model runs/paper --dataset /data/LEVIR-MCI",
    )
    parser.add_argument("--model", required=True, help="folder of the model; its calibration is saved in it")
    parser.add_argument("--dataset", required=True, help="as for `kcfi evaluate`")
    parser.add_argument("--split", default="val", help="pairs that the model was not trained on (%(default)s)")
    parser.add_argument(
        "--unchanged_split", help="a further split whose unchanged pairs count for the alarm rates: 0.01 needs 99"
    )
    parser.add_argument(
        "--mask_classes",
        choices=["change", "building", "road_building"],
        help="what the masks label; building where roads have no label (default: as the model was trained)",
    )
    parser.add_argument("--num_pairs", type=int, help="the first so many pairs of each split (all)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the first GPU, else the CPU)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`kcfi calibrate`."""
    from transformers.utils.logging import disable_progress_bar

    from kcfi.training.scoring.calibrate import calibrate

    disable_progress_bar()  # of loading weights, which is over before it can be read
    report = calibrate(
        options.model,
        options.dataset,
        options.split,
        options.unchanged_split,
        options.mask_classes,
        options.num_pairs,
        options.device,
    )
    print(json.dumps(report, indent=2))
