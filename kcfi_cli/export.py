"""`kcfi export`: the mask detector as ONNX."""

import argparse
from pathlib import Path

from kcfi_cli.options import Commands, add_model_option, check_results_file


def add_parser(commands: Commands) -> None:
    """The parser of `kcfi export`."""
    parser = commands.add_parser(
        "export",
        help="write the mask detector as ONNX",
        description="Write vision tower, perceiver and change detection head as one ONNX file: masks in onnxruntime, "
        'without the language model and without torch. Needs `pip install "kcfi[onnx]"`.',
        epilog="example: kcfi export --output detector.onnx",
    )
    add_model_option(parser)
    parser.add_argument("--output", required=True, type=Path, help="ONNX file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`kcfi export`."""
    from transformers.utils.logging import disable_progress_bar

    from kcfi.models import load
    from kcfi.onnx import export_detector

    disable_progress_bar()  # of loading weights, which is over before it can be read
    check_results_file(options.output, "detector.onnx")
    model, _ = load(options.model)
    export_detector(model.float().cpu(), options.output)
    print(f"{options.output}: pixel_values -> mask_logits, key_changes")
