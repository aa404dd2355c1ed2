"""`kcfi evaluate`: the scores of a model on a data set."""

import argparse
import json
from pathlib import Path

from kcfi_cli.options import Commands, add_drawing_options, add_meteor_option, add_model_options, check_results_file


def add_parser(commands: Commands) -> None:
    """The parser of `kcfi evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="score a model on a data set",
        description="Caption and mask every pair of a split; write results.json, predictions.json and pairs.png.",
        epilog="example: kcfi evaluate --dataset synthetic --num_pairs 20 --output runs/results.json",
    )
    add_model_options(parser)
    parser.add_argument(
        "--dataset",
        required=True,
        help="'synthetic', a LEVIR-CC / LEVIR-MCI folder, or what `datasets` opens: a folder of parquet shards, "
        "webdataset tars, images with metadata or JSON lines, or a Hub id",
    )
    parser.add_argument("--dataset_revision", help="branch, tag or commit of a data set on the Hub (the newest)")
    parser.add_argument(
        "--columns", help='what the columns of a Hub data set are called, as JSON: \'{"image_before": "A"}\''
    )
    parser.add_argument("--split", default="test", help="train, val or test (%(default)s)")
    parser.add_argument("--output", required=True, type=Path, help="results file; the others are written beside it")
    parser.add_argument("--num_pairs", type=int, help="the first so many pairs (all)")
    parser.add_argument("--seed", type=int, default=0, help="of synthetic scenes (%(default)s)")
    add_drawing_options(parser)
    parser.add_argument("--mask_classes", choices=["change", "building", "road_building"], help="as it was trained")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs at a time (%(default)s)")
    parser.add_argument(
        "--num_workers", type=int, help="processes that read images (default: 2 beside a GPU, else none)"
    )
    parser.add_argument("--feature_cache", metavar="DIR", help="keep the vision tower's features of every image there")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest caption, in tokens (%(default)s)")
    add_meteor_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`kcfi evaluate`."""
    from transformers.utils.logging import disable_progress_bar

    from kcfi.files import as_dict
    from kcfi.training.scoring.evaluate import evaluate_model

    disable_progress_bar()  # of loading weights, which is over before it can be read
    check_results_file(options.output)
    results = evaluate_model(
        options.model,
        options.dataset,
        options.split,
        options.output,
        num_pairs=options.num_pairs,
        seed=options.seed,
        mask_classes=options.mask_classes,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        meteor=not options.no_meteor,
        columns=as_dict(options.columns),
        materials=options.materials,
        pair_mix=as_dict(options.pair_mix),
        feature_cache=options.feature_cache,
        device=options.device,
        dtype=options.dtype,
        instruction=options.instruction,
        tile=options.tile,
        num_workers=options.num_workers,
        dataset_revision=options.dataset_revision,
    )
    print(json.dumps(results, indent=2))
