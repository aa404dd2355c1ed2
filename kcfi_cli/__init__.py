"""The command `kcfi`. Everything heavy is imported by the sub-command that needs it.

It stands outside of the package, whose import registers the Auto classes and so imports torch and transformers.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

EXAMPLES = """examples:
  kcfi caption before.png after.png                        sentence, mask and overlay by the embedded model
  kcfi caption images/A images/B --output report           every pair of two folders, into report/captions.csv
  kcfi caption before.tif after.tif --regions --json       also a sentence per changed region; all as JSON
  kcfi data synthesize --pairs 100 --output pairs          drawn pairs in the layout of LEVIR-MCI
  kcfi data check LEVIR-MCI                                every problem of a data set, and what its splits hold
  kcfi train debug                                         train for two minutes on drawn pairs
  kcfi train paper --dataset LEVIR-MCI --output_dir runs/paper
  kcfi evaluate --model runs/paper --dataset LEVIR-MCI --split test --output runs/paper/results.json
  kcfi score predictions.json --references LevirCCcaptions.json --split test --output scores.json
  kcfi ablate ablations --dataset LEVIR-MCI                the paper's tables, trained, scored and set beside the paper
  kcfi push runs/paper me/kcfi-levir --dry-run card        what would go to the Hub, with a card of the run
  kcfi serve --model runs/paper --port 8001                captions over HTTP, as OpenAI's chat completions
  kcfi export --model runs/paper --output detector.onnx    the mask alone, for onnxruntime
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0; 1 for a data set with problems (`kcfi data check`), runs that failed (`kcfi ablate`) or pairs
        of a list that could not be read (`kcfi caption`); 2 behind one line on stderr, for bad input or losses that
        are not finite; 130 on Ctrl-C.

    Raises:
        Exception: any other error is a bug; a note under its traceback says what a report needs.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["train"]:  # its options are the fields of the recipes, so it parses them itself
            from kcfi.training.train import main as train

            train(arguments[1:])
        else:
            parser = build_parser()
            options, more = parser.parse_known_args(arguments)
            if more and options.run not in (run_ablate, run_serve):  # who hand further options on
                parser.error(f"unrecognized arguments: {' '.join(more)}")
            options.fields = more
            return options.run(options) or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not is_input_error(error):
            error.add_note(bug_note(arguments))
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:  # without the number in front
            text = f"{error.filename}: {error.strerror}"
        print(f"kcfi: error: {' '.join([*text.split(), *getattr(error, '__notes__', [])])}", file=sys.stderr)
        return 2
    return 0


class UsageError(Exception):
    """A command line that cannot be run: the bad input that is found before anything heavy is imported."""


def is_input_error(error: Exception) -> bool:
    """Whether an error tells of what the user gave (options, files, the Hub, settings), and not of a bug."""
    if isinstance(error, OSError):  # but a file that an installed package misses is not the user's
        return "site-packages" not in str(error.filename)
    if isinstance(error, UsageError | FloatingPointError):
        return True
    processing = sys.modules.get("kcfi.processing")  # not loaded: then nothing can have raised its error
    return processing is not None and isinstance(error, processing.InputError)


def bug_note(arguments: Sequence[str]) -> str:
    """What stands under the traceback of an error that is not about the input."""
    import platform
    import shlex
    from importlib.metadata import version

    return (
        "This looks like a bug of kcfi, not like bad input. To report it, send this traceback with: kcfi "
        f"{version('kcfi')}, Python {platform.python_version()}, transformers {version('transformers')}, "
        f"command line: {shlex.join(['kcfi', *arguments])}"
    )


class _Parser(argparse.ArgumentParser):
    """Raises `UsageError` where argparse would print its usage and exit; no abbreviated options."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command but `train`."""
    parser = _Parser(
        prog="kcfi",
        description="Remote sensing image change captioning: what changed between two dates, and where.",
        epilog=EXAMPLES,
    )
    commands = parser.add_subparsers(metavar="command", required=True)

    caption = commands.add_parser(
        "caption",
        usage="kcfi caption BEFORE AFTER [options]\n       kcfi caption MANIFEST [options]",
        help="describe a pair of images, or many",
        description="Describe what changed between two co-registered images, and write a mask and an overlay.\n"
        "Of two folders, or a manifest, write captions.csv too: a second call does what is missing, and the exit code "
        "is 1 if\na pair could not be read.",
        epilog="examples:\n  kcfi caption before.png after.png --heatmap --output report\n"
        "  kcfi caption LEVIR-CC/images/test/A LEVIR-CC/images/test/B --output report",
    )
    caption.add_argument(
        "before",
        type=Path,
        metavar="BEFORE",
        help="image of the earlier date, a folder of them, or MANIFEST: a CSV "
        "file with columns before, after (paths) and maybe name",
    )
    caption.add_argument(
        "after",
        type=Path,
        nargs="?",
        metavar="AFTER",
        help="image of the later date, of the same size; or the folder of the images with the same names",
    )
    add_model_options(caption)
    caption.add_argument("--output", default="kcfi-output", type=Path, help="folder for the pictures (%(default)s)")
    caption.add_argument(
        "--bands",
        type=int,
        nargs=3,
        metavar=("R", "G", "B"),
        help="which bands of the files are red, green and blue, counted from 1; needed of four bands, for example",
    )
    caption.add_argument(
        "--stretch",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="percentiles that become black and white, as 2 98: needed of 16 bits and of most floats. Each band of "
        "each image gets its own",
    )
    caption.add_argument(
        "--max_image_pixels", type=int, metavar="N", help="read files of up to so many pixels (178956970)"
    )
    caption.add_argument(
        "--batch_size", type=int, default=8, help="pairs or tiles at a time (%(default)s); CPUs encode 2"
    )
    caption.add_argument(
        "--compile",
        action="store_true",
        help="let torch.compile translate the writing of sentences, which stay the same: meant for large language "
        "models beside a GPU, where it was not tried (on a CPU kcfi-tiny gains nothing)",
    )
    caption.add_argument("--regions", action="store_true", help="also write a sentence per changed region")
    caption.add_argument("--heatmap", action="store_true", help="also draw the strength of the key change features")
    caption.add_argument("--json", action="store_true", help="print one JSON object (per pair)")
    caption.set_defaults(run=run_caption)

    commands.add_parser("train", help="train from a recipe: `kcfi train --help`")  # main() takes it before

    evaluate = commands.add_parser(
        "evaluate",
        help="score a model on a data set",
        description="Caption and mask every pair of a split; write results.json, predictions.json and pairs.png.",
        epilog="example: kcfi evaluate --dataset synthetic --num_pairs 20 --output runs/results.json",
    )
    add_model_options(evaluate)
    evaluate.add_argument(
        "--dataset",
        required=True,
        help="'synthetic', a LEVIR-CC / LEVIR-MCI folder, or what `datasets` opens: a folder of parquet shards, "
        "webdataset tars, images with metadata or JSON lines, or a Hub id",
    )
    evaluate.add_argument("--dataset_revision", help="branch, tag or commit of a data set on the Hub (the newest)")
    evaluate.add_argument(
        "--columns", help='what the columns of a Hub data set are called, as JSON: \'{"image_before": "A"}\''
    )
    evaluate.add_argument("--split", default="test", help="train, val or test (%(default)s)")
    evaluate.add_argument("--output", required=True, type=Path, help="results file; the others are written beside it")
    evaluate.add_argument("--num_pairs", type=int, help="the first so many pairs (all)")
    evaluate.add_argument("--seed", type=int, default=0, help="of synthetic scenes (%(default)s)")
    add_drawing_options(evaluate)
    evaluate.add_argument("--mask_classes", choices=["change", "building", "road_building"], help="as it was trained")
    evaluate.add_argument("--batch_size", type=int, default=8, help="pairs at a time (%(default)s)")
    evaluate.add_argument(
        "--num_workers", type=int, help="processes that read images (default: 2 beside a GPU, else none)"
    )
    evaluate.add_argument(
        "--feature_cache", metavar="DIR", help="keep the vision tower's features of every image there"
    )
    evaluate.add_argument("--max_new_tokens", type=int, default=64, help="longest caption, in tokens (%(default)s)")
    evaluate.add_argument("--no-meteor", action="store_true", help="do without Java, METEOR and S_m*")
    evaluate.set_defaults(run=run_evaluate)

    score = commands.add_parser(
        "score",
        help="score any system's captions",
        description="Score a file {filename: caption} against the captions of LEVIR-CC.",
        epilog="example: kcfi score predictions.json --references LevirCCcaptions.json.gz --output scores.json",
    )
    score.add_argument("predictions", type=Path, help="JSON: {filename: caption}")
    score.add_argument("--references", required=True, type=Path, help="LevirCCcaptions.json or .json.gz")
    score.add_argument("--split", default="test", help="train, val or test (%(default)s)")
    score.add_argument(
        "--profile",
        default="coco",
        choices=["coco", "levir-ids"],
        help="protocol: coco, or levir-ids as RSICCFormer, Chg2Cap, Change-Agent ...: words as numbers (%(default)s)",
    )
    score.add_argument("--output", type=Path, help="results file (default: print only)")
    score.add_argument("--no-meteor", action="store_true", help="do without Java, METEOR and S_m*")
    score.set_defaults(run=run_score)

    ablate = commands.add_parser(
        "ablate",
        usage="kcfi ablate SET [--output DIR] [--rows ROW ...] [--seeds N ...] [--processes N] [--no-meteor] "
        "[--field value ...]",
        help="train and score a set of recipes",
        description="Train every recipe of a set with several seeds, score each on the test split, and write "
        "table.md, table.csv and chart.png.\nFields after the options go to every recipe. A second call does what is "
        "missing; the exit code is 1 if a run failed.",
        epilog="example: kcfi ablate ablations --rows baseline cfe --seeds 0 1 --dataset LEVIR-MCI",
    )
    ablate.add_argument("set", help="YAML file, or a packaged set: ablations, synthetic_ablations")
    ablate.add_argument("--output", type=Path, help="folder of the runs (runs/SET)")
    ablate.add_argument("--rows", nargs="+", default=[], help="names of the recipes to run (all)")
    ablate.add_argument("--seeds", type=int, nargs="+", default=[], help="those of the set to run now (all)")
    ablate.add_argument("--processes", type=int, default=1, help="processes of a training, one per GPU (%(default)s)")
    ablate.add_argument("--no-meteor", action="store_true", help="do without Java, METEOR and S_m*")
    ablate.set_defaults(run=run_ablate)

    data = commands.add_parser("data", help="make and check data sets").add_subparsers(metavar="action", required=True)
    synthesize = data.add_parser(
        "synthesize",
        help="draw synthetic pairs",
        description="Draw before/after pairs with masks and captions, in the folder layout of LEVIR-MCI.",
        epilog="example: kcfi data synthesize --pairs 100 --output pairs",
    )
    synthesize.add_argument(
        "--pairs", type=int, required=True, help="number of pairs; 80 %% train, 10 %% val, 10 %% test"
    )
    synthesize.add_argument("--output", type=Path, required=True, help="new folder")
    synthesize.add_argument("--seed", type=int, default=0, help="of the scenes (%(default)s)")
    add_drawing_options(synthesize)
    synthesize.set_defaults(run=run_synthesize)

    check = data.add_parser(
        "check",
        help="find what is wrong with a folder",
        description="Read every file of a LEVIR-CC, LEVIR-MCI or LEVIR-CD folder, or every row of a folder that "
        "`datasets` opens, print each problem and what each split holds. The exit code is 1 if there are problems.",
        epilog="example: kcfi data check LEVIR-MCI",
    )
    check.add_argument("root", type=Path, help="LEVIR-CC / LEVIR-MCI folder, or folder of shards or other rows")
    check.add_argument("--columns", help='what the columns of rows are called, as JSON: \'{"image_before": "A"}\'')
    check.set_defaults(run=run_check)

    convert = data.add_parser(
        "convert",
        help="write parquet shards",
        description="Copy LEVIR-CC or LEVIR-MCI into parquet shards with a dataset card; train on them by "
        "--dataset SHARDS, or upload them to the Hub. Images are copied as they are: run `kcfi data check` first.",
        epilog="example: kcfi data convert LEVIR-MCI --output shards",
    )
    convert.add_argument("root", type=Path, help="LEVIR-CC / LEVIR-MCI folder, or an archive of one (zip, tar)")
    convert.add_argument("--output", type=Path, required=True, help="new folder")
    convert.set_defaults(run=run_convert)

    materials = data.add_parser(
        "materials",
        help="cut a library of real surfaces and roofs",
        description="Turn folders of single-date aerial images into a library of ground, roofs and places, which "
        "pairs are drawn with. Each folder is described by its source.yaml.",
        epilog="example: kcfi data materials --source my_town --output library",
    )
    materials.add_argument("--source", type=Path, nargs="+", required=True, metavar="DIR", help="folders")
    materials.add_argument("--output", type=Path, required=True, help="new folder")
    materials.set_defaults(run=run_materials)

    push = commands.add_parser(
        "push",
        help="put a run on the Hub",
        description="Upload weights, code, processor and a generated model card of a finished run to the Hugging Face "
        "Hub (log in with `hf auth login`).\nCall it from where the run was trained: a tower whose name is no folder "
        "here stands in the card as a model of the Hub.",
        epilog="example: kcfi push runs/paper me/kcfi-levir --dry-run card",
    )
    push.add_argument("folder", type=Path, help="output_dir of `kcfi train`")
    push.add_argument("repo_id", help="owner/name on the Hub; created if missing")
    push.add_argument(
        "--results",
        type=Path,
        help="results file of `kcfi evaluate`; pairs.png beside it is uploaded too (default: results.json of FOLDER)",
    )
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument(
        "--license",
        metavar="NAME",
        help="licence of the weights, as the Hub calls it (default: that of the towers, where their cards agree)",
    )
    push.add_argument("--dry-run", type=Path, metavar="DIR", help="write what would be uploaded into a new folder")
    push.add_argument(
        "--text-model",
        metavar="ID",
        help="Hub id of the language model, if it was kept frozen: its weights are left out, and fetched from there "
        "whenever the model is loaded (default: they are uploaded)",
    )
    push.set_defaults(run=run_push)

    serve = commands.add_parser(
        "serve",
        usage="kcfi serve [--model MODEL] [--option value ...]",
        help="answer requests over HTTP",
        description="Serve the captions of a model by `transformers serve`, which speaks OpenAI's chat completions.\n"
        "Further options go to it: --host, --port, --device, --dtype ... (`transformers serve --help`).",
        epilog="example: kcfi serve --model runs/paper --port 8001",
    )
    serve.add_argument("--model", default="kcfi-tiny", help="folder or Hub id (default: the embedded kcfi-tiny)")
    serve.set_defaults(run=run_serve)

    export = commands.add_parser(
        "export",
        help="write the mask detector as ONNX",
        description="Write vision tower, perceiver and change detection head as one ONNX file: masks in onnxruntime, "
        'without the language model and without torch. Needs `pip install "kcfi[onnx]"`.',
        epilog="example: kcfi export --output detector.onnx",
    )
    export.add_argument("--model", default="kcfi-tiny", help="folder or Hub id (default: the embedded kcfi-tiny)")
    export.add_argument("--output", required=True, type=Path, help="ONNX file")
    export.set_defaults(run=run_export)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that describe pairs: which model, where and how it computes, what it is asked."""
    parser.add_argument("--model", default="kcfi-tiny", help="folder or Hub id (default: the embedded kcfi-tiny)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the first GPU, else the CPU)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights (default: as they were saved on CUDA, else float32). bfloat16 is faster on CPUs that "
        "have it in hardware; sentences may differ",
    )
    parser.add_argument("--instruction", help="what the model is asked (default: the first of the paper's Table I)")
    parser.add_argument(
        "--tile",
        type=int,
        help="side in px of the images that the model was trained on, and of the squares that larger ones are cut "
        "into (default: as saved with the model)",
    )


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that draw synthetic pairs with real materials."""
    parser.add_argument("--materials", help="library of `kcfi data materials`: draw with real ground and roofs")
    parser.add_argument(
        "--pair_mix",
        help='weights of the kinds of synthetic pairs, as JSON: \'{"drawn": 1, "composed": 1, "single_date": 1}\' '
        "(default: all alike with --materials, only drawn without)",
    )


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, or created, before the work is done.

    Raises:
        UsageError: a file stands in its place or above it, or the rights are missing.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(f"--output: {existing} is a file; give a folder, or a path below one.")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"--output: {existing} is not writable; choose another folder.")


def check_results_file(path: Path, example: str = "results.json") -> None:
    """Refuse a file of results that cannot be written; `example` is a name for the message.

    Raises:
        UsageError: it is a folder, or `check_writable` refuses its folder.
    """
    if path.is_dir():
        raise UsageError(f"--output: {path} is a folder; give a file, for example {path / example}.")
    check_writable(path.parent)


def run_caption(options: argparse.Namespace) -> int:
    """`kcfi caption`; the exit code is 1 if pairs of a list could not be read."""
    from transformers.utils.logging import disable_progress_bar

    from kcfi.pictures import save_pictures
    from kcfi.processing.reading_kcfi import read_pair

    disable_progress_bar()  # of loading weights, which is over before it can be read
    manifest = options.after is None and options.before.suffix.lower() == ".csv"
    if options.after is None and not manifest:
        raise UsageError(f"Give the later image too, or a manifest (.csv) in place of {options.before}.")
    if manifest or options.before.is_dir():
        return caption_list(options)
    for path in (options.before, options.after):
        path.stat()  # not there: said before a model is loaded
    check_writable(options.output)
    describer = build_describer(options)
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
        print(f"changed: {report.changed_fraction:.1%} of the area")
    for region in report.regions:
        left, top, right, bottom = region.box
        print(f"  x {left}-{right}, y {top}-{bottom} ({region.pixels} px): {region.caption}")
    for kind, path in files.items():
        print(f"{kind}: {path}")
    return 0


def reading(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of `read_pair` that were given."""
    settings = {name: getattr(options, name) for name in ("bands", "stretch", "max_image_pixels")}
    return {name: value for name, value in settings.items() if value is not None}


def build_describer(options: argparse.Namespace) -> Any:
    """The Describer that the options of `kcfi caption` ask for."""
    from kcfi.models import compiled_steps, load, validation_dtype
    from kcfi.processing import INSTRUCTIONS, Describer

    model, processor = load(options.model, options.device, options.dtype)
    autocast = None if options.dtype else validation_dtype(options.model, model.device)
    settings = (options.tile, options.batch_size, options.instruction or INSTRUCTIONS[0], autocast)
    return Describer(model, processor, *settings, **(compiled_steps() if options.compile else {}))


def caption_list(options: argparse.Namespace) -> int:
    """`kcfi caption` for two folders or a manifest."""
    from tqdm import tqdm

    from kcfi.pair_list import TABLE, describe_list, find_pairs

    pairs = find_pairs(options.before, options.after)
    check_writable(options.output)
    describer = build_describer(options)
    # a table has one kind of sentences
    asked = {name: getattr(options, name) for name in ("dtype", "tile", "instruction", "bands", "stretch")}
    model = options.model + "".join(f" {name}={value}" for name, value in asked.items() if value is not None)
    failed = 0
    for row in describe_list(
        describer, pairs, options.output, model, options.regions, options.heatmap, **reading(options)
    ):
        failed += row["error"] is not None
        changed = "" if row["changed_fraction"] is None else f" ({row['changed_fraction']:.1%})"
        line = f"{row['name']}: {row['error'] or row['caption']}{changed}"
        tqdm.write(json.dumps(row) if options.json else line)
    if not options.json:
        print(f"{len(pairs) - failed} of {len(pairs)} pairs: {options.output / TABLE}")
    return 1 if failed else 0


def run_evaluate(options: argparse.Namespace) -> None:
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


def run_score(options: argparse.Namespace) -> None:
    """`kcfi score`."""
    from kcfi.training.scoring.metrics import score_file

    if options.output:
        check_results_file(options.output)
    results = score_file(
        options.predictions, options.references, options.split, options.profile, meteor=not options.no_meteor
    )
    text = json.dumps(results, indent=2)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def run_ablate(options: argparse.Namespace) -> int:
    """`kcfi ablate`; returns its exit code."""
    from kcfi.training.ablate import ablate
    from kcfi.training.ablation_table import read_set
    from kcfi.training.scoring.metrics import require_java

    output = options.output or Path("runs") / Path(options.set).stem
    check_writable(output)
    if not options.no_meteor:
        require_java()  # now, not after a day of training
    plan = read_set(options.set)
    runs = plan.runs(options.rows, options.seeds)
    errors = ablate(plan, runs, output, options.fields, not options.no_meteor, options.processes)
    print(f"{output / 'table.md'}, table.csv, chart.png; failed: {len(errors)} of {len(runs)} runs")
    return 1 if errors else 0


def run_check(options: argparse.Namespace) -> int:
    """`kcfi data check`; returns its exit code."""
    from kcfi.files import as_dict
    from kcfi.training.data.check import check_folder, counts_table

    problems, counts = check_folder(options.root, as_dict(options.columns))
    for problem in problems:
        print(problem)
    print(counts_table(counts))
    disagreeing = sum(count.disagreeing for count in counts.values())
    print(f"pairs whose changeflag and mask disagree: {disagreeing} (both are kept)")
    print(f"problems: {len(problems)}")
    return 1 if problems else 0


def run_convert(options: argparse.Namespace) -> None:
    """`kcfi data convert`."""
    from datasets import disable_progress_bars

    from kcfi.training.data.shards import write_shards

    disable_progress_bars()  # one per shard; ours counts pairs
    check_writable(options.output)
    write_shards(options.root, options.output)
    print(f"{options.output}: train on it with `kcfi train RECIPE --dataset {options.output}`")


def run_materials(options: argparse.Namespace) -> None:
    """`kcfi data materials`."""
    from kcfi.training.materials.cut import write_library

    check_writable(options.output)
    counts = write_library(options.source, options.output)
    print(", ".join(f"{kind}: {count}" for kind, count in counts.items()))
    print(f"{options.output}: look at {options.output / 'contact_sheet.png'}")


def run_synthesize(options: argparse.Namespace) -> None:
    """`kcfi data synthesize`."""
    from kcfi.files import as_dict
    from kcfi.training.synthetic.dataset import synthesize

    check_writable(options.output)
    synthesize(
        options.output,
        options.pairs,
        options.seed,
        materials=options.materials,
        pair_mix=as_dict(options.pair_mix),
    )
    print(f"{options.pairs} pairs: {options.output}, with a picture of some: {options.output / 'contact_sheet.png'}")


def run_push(options: argparse.Namespace) -> None:
    """`kcfi push`."""
    from kcfi.training.sharing.export import push

    what = (options.folder, options.repo_id, options.results)
    print(push(*what, options.private, options.license, options.dry_run, options.text_model))


def run_serve(options: argparse.Namespace) -> None:
    """`kcfi serve`."""
    from kcfi.serving import serve

    serve(options.model, options.fields)


def run_export(options: argparse.Namespace) -> None:
    """`kcfi export`."""
    from transformers.utils.logging import disable_progress_bar

    from kcfi.models import load
    from kcfi.onnx import export_detector

    disable_progress_bar()  # of loading weights, which is over before it can be read
    check_results_file(options.output, "detector.onnx")
    model, _ = load(options.model)
    export_detector(model.float().cpu(), options.output)
    print(f"{options.output}: pixel_values -> mask_logits, key_changes")
