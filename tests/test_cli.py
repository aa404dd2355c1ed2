"""The command `kcfi`: what it prints, what it writes, and what it refuses in one line."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from PIL import Image
from transformers import CompileConfig

from kcfi.models import load
from kcfi.training.arguments import parse_recipe
from kcfi.training.load import load_pairs
from kcfi.training.train import save_recipe
from kcfi_cli import main


@pytest.fixture
def pair(tmp_path, make_pair, monkeypatch):
    """`before.png` and `after.png` of 70 x 45 px in the current folder; a square changes."""
    monkeypatch.chdir(tmp_path)
    for name, image in zip(("before.png", "after.png"), make_pair(70, 45, (40, 10, 60, 34)), strict=True):
        image.save(name)
    return ["before.png", "after.png"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of ten synthetic pairs, one of them in the split "test"."""
    folder = tmp_path_factory.mktemp("scenes") / "pairs"
    assert main(["data", "synthesize", "--pairs", "10", "--output", str(folder)]) == 0
    return folder


def refusal(capsys, *arguments):
    """The one line on stderr of a command that must fail with exit code 2 and print nothing."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("kcfi: error: ") and printed.err.count("\n") == 1
    return printed.err.removeprefix("kcfi: error: ").strip()


# caption


def test_caption_prints_the_sentence_and_the_changed_fraction(capsys, pair, detector):
    assert main(["caption", *pair, "--model", str(detector)]) == 0
    sentence, described, changed, mask, overlay = capsys.readouterr().out.splitlines()
    assert described.startswith("described: x ") and described.endswith(", which changed most")  # 70 px of tiles of 32
    values = np.asarray(Image.open("kcfi-output/after_mask.png"))
    assert values.shape == (45, 70) and set(np.unique(values)) == {0, 255}
    assert sentence and changed.startswith(f"changed: {(values > 0).mean():.1%} of the area (probability ")
    assert (mask, overlay) == ("mask: kcfi-output/after_mask.png", "overlay: kcfi-output/after_overlay.png")
    drawn, after = np.asarray(Image.open("kcfi-output/after_overlay.png")), np.asarray(Image.open(pair[1]))
    assert ((drawn != after).any(-1) == (values > 0)).all()


def test_device_precision_question_and_reading_are_options(capsys, pair, detector):
    arguments = ["caption", *pair, "--model", str(detector), "--json", "--tile", "80"]

    def said(*options):
        assert main([*arguments, *options]) == 0
        return json.loads(capsys.readouterr().out)

    plain = said()
    assert plain["caption_box"] == [0, 0, 70, 45]
    assert said("--device", "cpu", "--dtype", "float32") == plain
    assert said("--dtype", "bfloat16")["score"] != plain["score"]
    assert said("--instruction", "what changed ?")["caption"] != plain["caption"]
    shown = said("--bands", "3", "2", "1", "--stretch", "2", "98")
    assert shown["caption"] != plain["caption"]
    assert "--device nowhere: " in refusal(capsys, *arguments, "--device", "nowhere")
    assert "max_image_pixels, 100," in refusal(capsys, *arguments, "--max_image_pixels", "100")


def test_json_is_one_object_on_stdout(capsys, pair, detector):
    arguments = ["caption", *pair, "--model", str(detector), "--json", "--output", "a/b"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    names = ["caption", "caption_box", "score", "changed_fraction", "changed_probability", "mask", "overlay", "model"]
    assert list(report) == names and len(report["caption_box"]) == 4 and 0 < report["score"] < 1
    assert report["model"] == str(detector) and 0 < report["changed_fraction"] < 0.3
    assert main([*arguments, "--heatmap", "--regions"]) == 0
    full = json.loads(capsys.readouterr().out)
    assert [full[name] for name in names if name != "score"] == [report[name] for name in names if name != "score"]
    assert full.keys() - report.keys() == {"heatmap", "regions"}
    for kind in ("mask", "overlay", "heatmap"):
        assert Image.open(full[kind]).size == (70, 45), kind
    [region] = full["regions"]
    left, top, right, bottom = region["box"]
    changed = np.asarray(Image.open(full["mask"]))[top:bottom, left:right] > 0
    assert region["pixels"] == changed.sum() > 0 and region["caption"]


def test_regions_are_printed_with_their_place(capsys, pair, detector):
    assert main(["caption", *pair, "--model", str(detector), "--regions", "--tile", "45"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  x ")]
    assert re.search(r"y \d+-\d+ \(\d+ px, \d+%\): ", line)


def test_a_model_without_a_head_writes_no_mask(capsys, pair, make_detector, tmp_path):
    model = make_detector(tmp_path / "model", use_change_detection_head=False)
    assert main(["caption", *pair, "--model", str(model), "--json", "--heatmap"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["changed_fraction"] is report["mask"] is report["overlay"] is None
    assert [path.name for path in (tmp_path / "kcfi-output").iterdir()] == ["after_heatmap.png"]


def test_compile_reaches_a_pair_and_a_list_and_changes_no_sentence(capsys, pair, detector, tmp_path, monkeypatch):
    monkeypatch.setattr("kcfi.processing.describer_kcfi.LONGEST", 8)
    monkeypatch.setattr("kcfi.models.CompileConfig", partial(CompileConfig, backend="eager"))  # seconds, not minutes
    (tmp_path / "list.csv").write_text("before,after\nbefore.png,after.png\n")
    sentences, graphs = set(), torch._dynamo.utils.counters["stats"]
    for inputs in (pair, ["list.csv"]):
        for options in ([], ["--compile"]):
            torch.compiler.reset()
            graphs.clear()
            output = ["--output", f"{len(inputs)}{len(options)}"]
            assert main(["caption", *inputs, "--model", str(detector), "--json", *options, *output]) == 0
            sentences.add(json.loads(capsys.readouterr().out)["caption"])
            assert bool(graphs["unique_graphs"]) == bool(options)
    assert len(sentences) == 1


def test_a_dtype_reaches_a_pair_and_a_list_whose_table_tells(capsys, pair, detector, monkeypatch):
    loaded, bf16 = [], ["--dtype", "bfloat16"]
    monkeypatch.setattr("kcfi.models.load", lambda *options: loaded.append(load(*options)) or loaded[-1])
    Path("list.csv").write_text("before,after\nbefore.png,after.png\n")
    for inputs in (pair, ["list.csv"]):
        assert main(["caption", *inputs, "--model", str(detector), *bf16, "--output", f"out{len(inputs)}"]) == 0
    kept = [model.dtype for model, _ in loaded if model.device.type != "meta"]  # lists are checked first
    assert kept == [torch.bfloat16] * 2
    capsys.readouterr()
    with_it = "out1 was written with dtype=bfloat16, not None: choose another --output."
    assert with_it in refusal(capsys, "caption", "list.csv", "--model", detector, "--output", "out1")


# What caption refuses


def test_a_missing_image_is_named(capsys, pair):
    assert refusal(capsys, "caption", "nowhere.png", pair[1]) == "nowhere.png: No such file or directory"


def test_a_file_that_is_no_image_is_named(capsys, pair, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    assert refusal(capsys, "caption", pair[0], "text.png").startswith("text.png: cannot be read as an image")
    assert refusal(capsys, "caption", pair[0], tmp_path).startswith(f"{tmp_path}: cannot be read as an image")


def test_images_of_different_sizes_are_refused_with_both_sizes(capsys, pair):
    Image.new("RGB", (70, 44)).save("small.png")
    message = refusal(capsys, "caption", pair[0], "small.png")
    assert "before.png is 70 x 45 px" in message and "small.png is 70 x 44 px" in message


def test_16_bit_images_are_refused_with_the_remedy(capsys, pair):
    Image.fromarray(np.full((45, 70), 3000, np.uint16)).save("deep.png")
    message = refusal(capsys, "caption", pair[0], "deep.png")
    assert "deep.png" in message and "--stretch 2 98" in message


def test_an_unknown_model_is_named(capsys, pair, tmp_path):
    assert refusal(capsys, "caption", *pair, "--model", "./nothing").startswith("No model ./nothing: it is neither")
    assert refusal(capsys, "caption", *pair, "--model", "nobody/nothing").startswith(
        "Cannot load the model 'nobody/nothing'"
    )
    (tmp_path / "runs").mkdir()
    assert "the folder runs is here" in refusal(capsys, "caption", *pair, "--model", "runs/paper")
    assert refusal(capsys, "caption", *pair, "--model", tmp_path).startswith(f"Cannot load the model '{tmp_path}'")


def test_regions_need_a_head(capsys, pair, make_detector, tmp_path):
    model = make_detector(tmp_path / "model", use_change_detection_head=False)
    assert "no change detection head" in refusal(capsys, "caption", *pair, "--model", model, "--regions")


@pytest.mark.parametrize("output", ["before.png", "before.png/deeper"])
def test_an_output_that_is_a_file_is_refused_before_the_model_is_loaded(capsys, pair, output):
    message = refusal(capsys, "caption", *pair, "--output", output, "--model", "./nothing")
    assert message.endswith("before.png is a file; give a folder, or a path below one.")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_rights_is_refused(capsys, pair, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "is not writable" in refusal(capsys, "caption", *pair, "--output", "locked/deeper", "--model", "./nothing")


def test_wrong_options_are_one_line_too(capsys):
    assert refusal(capsys, "caption", "a.png").startswith("Give the later image too, or a manifest (.csv, ")
    assert "--no_pictures is for lists" in refusal(capsys, "caption", "a.png", "b.png", "--no_pictures")
    assert refusal(capsys, "caption", "nowhere.csv") == "nowhere.csv: No such file or directory"
    assert refusal(capsys, "score", "a.json").endswith("required: --references (see `kcfi score --help`)")
    assert "invalid choice: 'capture'" in refusal(capsys, "capture")
    assert "unrecognized arguments: --jsn" in refusal(capsys, "caption", "a.png", "b.png", "--jsn")
    assert refusal(capsys).endswith("required: command (see `kcfi --help`)")


# scene


def test_a_scene_is_described_and_its_largest_changes_are_listed(capsys, pair, detector):
    command = ["scene", *pair, "-o", "report", "--model", str(detector), "--batch_size", "2", "--min_area", "30"]
    assert main(command) == 0
    caption, change, warning, report = capsys.readouterr().out.splitlines()
    assert (
        caption.startswith("1 change: buildings ") and change.startswith("  1: ") and " px, probability 0." in change
    )
    assert warning == "warning: The model does not say at how many m per pixel it was trained; 0.5 was taken."
    assert report == "report: report/report.html"
    values = np.asarray(Image.open("report/mask.tif"))
    assert values.shape == (45, 70) and set(np.unique(values)) == {0, 2}
    assert main([*command, "--max_captions", "0", "--acquired", "2019-06-01", "2024-05-30", "--align"]) == 0
    assert "  1: a building has changed in the" in capsys.readouterr().out


def test_of_more_than_two_dates_each_change_has_the_one_on_which_it_is_first_seen(capsys, pair, detector):
    command = ["scene", *pair, pair[1], "-o", "report", "--model", str(detector), "--min_area", "30"]
    days = ["2019-06-01", "2021-05-28", "2024-05-30"]
    assert main([*command, "--max_captions", "0", "--acquired", *days, "--confirm", "1"]) == 0
    properties = json.loads(Path("report/changes.geojson").read_text())["features"][0]["properties"]
    assert [properties[name] for name in ("before", "after", "first_seen")] == [days[0], days[1], days[1]]
    assert "confirmed" not in capsys.readouterr().out


def test_dates_and_confirmations_that_cannot_be_are_refused_before_the_model_is_loaded(capsys, pair):
    command = ["scene", *pair, "--model", "no such model"]
    message = refusal(capsys, *command, "--acquired", "2019-06-01", "30.05.2024")
    assert message == "acquired: '30.05.2024' is no date in ISO 8601, as 2021-05-30."
    assert "acquired names 1 dates for 2 images" in refusal(capsys, *command, "--acquired", "2019-06-01")
    assert "of 3 dates 0 to 1 can confirm a change" in refusal(capsys, "scene", *pair, pair[1], "--confirm", "2")


def test_a_scene_that_cannot_be_read_is_named(capsys, pair, tmp_path):
    assert refusal(capsys, "scene", "nowhere.tif", pair[1]) == "nowhere.tif: No such file or directory"
    (tmp_path / "text.tif").write_text("no raster")
    assert "text.tif: cannot be read as a raster" in refusal(capsys, "scene", pair[0], "text.tif")
    Image.new("RGB", (9, 9)).save("small.png")
    assert "before.png is 70 x 45 px, small.png 9 x 9 px" in refusal(capsys, "scene", pair[0], "small.png")
    assert "must be a low and a higher percentile" in refusal(capsys, "scene", *pair, "--stretch", "98", "2")


@pytest.fixture
def placed(pair):
    """`before.tif` and `after.tif`: the pair on a grid in UTM."""
    rasterio = pytest.importorskip("rasterio")
    for path in pair:
        pixels = np.asarray(Image.open(path)).transpose(2, 0, 1)
        place = {"crs": "EPSG:32650", "transform": rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 4_400_000)}
        with rasterio.open(
            path.replace("png", "tif"), "w", count=3, width=70, height=45, dtype="uint8", **place
        ) as file:
            file.write(pixels)
    return ["before.tif", "after.tif"]


LIBRARIES = Path(__file__).parents[1] / "kcfi/scenes/libraries"
with_libraries = pytest.mark.skipif(not LIBRARIES.is_dir(), reason="no libraries: `make libraries`")


@with_libraries
def test_a_scene_becomes_a_site_that_says_how_to_be_looked_at(capsys, placed, detector):
    command = ["scene", *placed, "-o", "report", "--site", "site", "--model", str(detector), "--min_area", "5"]
    assert main(command) == 0
    *_, report, site = capsys.readouterr().out.splitlines()
    assert report == "report: report/report.html"
    assert site == "site: site/index.html (a web server shows it: `python -m http.server -d site`)"
    caption = json.loads(Path("report/changes.geojson").read_text())["features"][0]["properties"]["caption"]
    assert f'<span class="sentence">{caption}</span>' in Path("site/index.html").read_text()


@with_libraries
def test_a_site_that_cannot_be_is_refused_before_the_model_is_loaded(capsys, pair, placed, tmp_path, monkeypatch):
    command = ["--model", "no such model", "-o", "report", "--site"]
    assert "before.png: a site is a map, and needs" in refusal(capsys, "scene", *pair, *command, "site")
    assert "report: is the folder of the report" in refusal(capsys, "scene", *placed, *command, "report")
    assert "before.png is a file" in refusal(capsys, "scene", *placed, *command, "before.png")
    monkeypatch.setattr("kcfi.scenes.site.LIBRARIES", tmp_path / "nothing")
    assert "run `make libraries`" in refusal(capsys, "scene", *placed, *command, "site")
    assert not Path("report").exists() and not Path("site").exists()


def test_without_the_extra_one_line_says_what_to_install(pair, environment):
    code = (
        "import sys, importlib.util as util; found = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'shapely' else found(name, *more)\n"
        "from kcfi_cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "scene", *pair]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == 'kcfi: error: Scenes need shapely: pip install "kcfi[geo]"\n'


# What is a bug shows its traceback


def test_an_error_of_a_library_is_no_bad_input_and_tells_what_a_report_needs(pair, detector, monkeypatch, capsys):
    def fails(*_):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr("kcfi.pictures.save_pictures", fails)
    with pytest.raises(ValueError, match="broadcast") as raised:
        main(["caption", *pair, "--model", str(detector), "--output", "a folder"])
    [note] = raised.value.__notes__
    assert f"kcfi {version('kcfi')}, Python 3." in note and f"transformers {version('transformers')}" in note
    assert note.endswith(f"command line: kcfi caption {' '.join(pair)} --model {detector} --output 'a folder'")
    assert capsys.readouterr().err == ""  # the interpreter prints the traceback, and the note under it


def test_a_file_that_an_installed_package_misses_is_no_bad_input(monkeypatch, tmp_path):
    def fails(*_, **__):
        raise FileNotFoundError(2, "No such file or directory", "/venv/lib/python3.11/site-packages/kcfi/part.json")

    monkeypatch.setattr("kcfi.training.synthetic.dataset.synthesize", fails)
    with pytest.raises(FileNotFoundError):
        main(["data", "synthesize", "--pairs", "10", "--output", str(tmp_path / "new")])


def test_the_process_shows_a_bug_with_its_note_last(environment):
    code = "import sys, kcfi_cli\nkcfi_cli.score.run = lambda options: 1 / 0\nsys.exit(kcfi_cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "score", "a.json", "--references", "b.json"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = process.stderr.splitlines()
    assert process.returncode == 1 and lines[0].startswith("Traceback") and "ZeroDivisionError" in lines[-2]
    assert lines[-1].startswith("This looks like a bug of kcfi") and lines[-1].endswith("--references b.json")


# data, evaluate, score


def test_synthesized_pairs_are_evaluated_and_their_predictions_scored(capsys, scenes, detector, tmp_path):
    assert (scenes / "contact_sheet.png").is_file()
    output = tmp_path / "new" / "results.json"
    arguments = ["--dataset", str(scenes), "--split", "train", "--num_pairs", "8", "--no-meteor"]
    assert main(["evaluate", "--model", str(detector), *arguments, "--output", str(output)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(output.read_text()) and report["pairs"]["all"] == 8
    assert report["captions"]["all"]["meteor"] is None and report["mask"]["f1"]["change"] > 0
    assert Image.open(output.with_name("pairs.png")).width > 1000

    references, scores = scenes / "LevirCCcaptions.json", tmp_path / "scores.json"
    files = [str(output.with_name("predictions.json")), "--references", str(references), "--output", str(scores)]
    options = ["--split", "train", "--no-meteor"]
    assert main(["score", *files, *options, "--profile", "levir-ids"]) == 0
    assert json.loads(capsys.readouterr().out)["profile"] == "levir-ids"
    assert main(["score", *files, *options]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored == json.loads(scores.read_text()) and scored["captions"] == report["captions"]


def test_what_is_there_is_written_anew_on_windows(capsys, scenes, detector, tmp_path, run, windows):
    options = ["--dataset", str(scenes), "--split", "test", "--no-meteor", "--output", str(tmp_path / "results.json")]
    for _ in range(2):
        assert main(["evaluate", "--model", str(detector), *options]) == 0
    for folder, command in (("shards", ["data", "convert", str(scenes), "--output"]), ("card", None)):
        (tmp_path / folder).mkdir()
        command = command or ["push", str(run), "me/kcfi-own", "--dry-run"]
        assert main([*command, str(tmp_path / folder)]) == 0, capsys.readouterr().err
        assert any((tmp_path / folder).iterdir())


def test_data_sets_that_cannot_be_used_are_named(capsys, scenes, tmp_path):
    def evaluate(dataset, *more):
        output = tmp_path / "results.json"
        return refusal(capsys, "evaluate", "--dataset", dataset, "--output", output, "--model", "./nothing", *more)

    assert evaluate(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such folder"
    assert "no LevirCCcaptions.json" in evaluate(tmp_path)
    assert evaluate("nobody/nothing").startswith("nobody/nothing: neither a folder nor a data set on the Hub")
    assert "no pair of split 'tset'; its splits: test, train, val" in evaluate(scenes, "--split", "tset")
    assert "expected at least 1" in evaluate(scenes, "--num_pairs", "0")
    assert "No model ./nothing" in evaluate(scenes)


def test_an_unreadable_image_of_a_data_set_is_named(capsys, scenes, detector, tmp_path):
    (tmp_path / "images").symlink_to(scenes / "images")
    content = json.loads((scenes / "LevirCCcaptions.json").read_text())
    content["images"][-1]["filename"] = "gone.png"
    (tmp_path / "LevirCCcaptions.json").write_text(json.dumps(content))
    arguments = ["--dataset", tmp_path, "--model", detector, "--output", tmp_path / "results.json", "--no-meteor"]
    assert main(["evaluate", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]  # behind the progress bar
    assert printed.out == "" and last.startswith("kcfi: error: ") and "gone.png: no such file" in last.lower()


def test_a_results_file_that_is_a_folder_is_refused_before_the_work(capsys, scenes, tmp_path):
    for command in (
        ["evaluate", "--dataset", "nowhere", "--output", tmp_path],
        ["score", "nowhere.json", "--references", "nowhere.json", "--output", tmp_path],
    ):
        assert refusal(capsys, *command).startswith(f"--output: {tmp_path} is a folder; give a file")
    (tmp_path / "file").touch()
    below = ["evaluate", "--dataset", "nowhere", "--output", tmp_path / "file" / "results.json"]
    assert refusal(capsys, *below).startswith(f"--output: {tmp_path / 'file'} is a file")


def test_pairs_are_drawn_into_shards_that_training_reads(capsys, tmp_path):
    shards = tmp_path / "shards"
    assert main(["data", "synthesize", "--pairs", "10", "--shards", "--output", str(shards)]) == 0
    assert capsys.readouterr().out == f"{shards}: train on it with `kcfi train RECIPE --dataset {shards}`\n"
    pairs = load_pairs(str(shards), "val")
    assert len(pairs) == 1 and pairs[0]["captions"]


def test_synthesize_never_mixes_with_what_is_there(capsys, scenes):
    message = refusal(capsys, "data", "synthesize", "--pairs", "10", "--output", scenes)
    assert "is not an empty folder: choose a new one" in message
    assert "--output" in refusal(
        capsys, "data", "synthesize", "--pairs", "10", "--output", scenes / "contact_sheet.png"
    )
    assert "at least 10" in refusal(capsys, "data", "synthesize", "--pairs", "9", "--output", scenes / "new")
    assert not (scenes / "new").exists()


def test_check_prints_problems_and_counts_and_exits_with_1(capsys, scenes, tmp_path):
    assert main(["data", "check", str(scenes)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["split", "pairs"]
    assert [line.split()[:5] for line in lines[1:4]] == [
        ["train", "8", "4", "4", "40"],
        ["val", "1", "0", "1", "5"],
        ["test", "1", "0", "1", "5"],
    ]
    assert lines[4:] == ["pairs whose changeflag and mask disagree: 0 (both are kept)", "problems: 0"]

    (tmp_path / "LevirCCcaptions.json").write_bytes((scenes / "LevirCCcaptions.json").read_bytes())
    (tmp_path / "images").mkdir()
    for split in ("train", "val"):
        (tmp_path / "images" / split).symlink_to(scenes / "images" / split)
    assert main(["data", "check", str(tmp_path)]) == 1
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'images/test/A'}: no such folder; expected the images of split 'test'"
    assert second.startswith(f"{tmp_path / 'images/test/B'}: no such folder") and last == "problems: 2"
    assert refusal(capsys, "data", "check", tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such folder"


def test_a_folder_and_its_shards_score_alike(capsys, scenes, detector, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shards = tmp_path / "shards"
    assert main(["data", "convert", str(scenes), "--output", str(shards)]) == 0
    assert capsys.readouterr().out == f"{shards}: train on it with `kcfi train RECIPE --dataset {shards}`\n"
    assert main(["data", "check", str(shards)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "problems: 0"
    reports = []
    for dataset in (scenes, shards):
        options = ["--dataset", str(dataset), "--split", "test", "--no-meteor"]  # train rows are shuffled in shards
        output = str(tmp_path / "results.json")
        assert main(["evaluate", "--model", str(detector), *options, "--output", output]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[1] == {**reports[0], "dataset": str(shards)}
    assert "is not an empty folder" in refusal(capsys, "data", "convert", scenes, "--output", shards)


def test_score_names_what_it_misses(capsys, scenes, tmp_path):
    predictions = tmp_path / "predictions.json"
    predictions.write_text(json.dumps({"another.png": "a house appears ."}))
    command = ["score", predictions, "--references", scenes / "LevirCCcaptions.json", "--no-meteor"]
    message = refusal(capsys, *command)
    assert "1 missing: test_000000.png" in message and "1 not in the split: another.png" in message


# train


def test_train_refuses_unknown_fields_and_recipes(capsys):
    message = refusal(capsys, "train", "debug", "--lerning_rate", "1")
    assert message == "Unknown field 'lerning_rate': did you mean 'learning_rate'?"
    assert re.search("packaged recipes: .*debug, .*paper, ", refusal(capsys, "train", "debgu"))


def test_train_refuses_a_setting_of_the_model_that_is_unknown(capsys, tmp_path):
    towers = ["--text_model", tmp_path, "--vision_config", '{"model_type": "vit"}', "--output_dir", tmp_path / "run"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset: synthetic")
    assert "projector" in refusal(capsys, "train", recipe, *towers, "--model_settings.projector", "mlp")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            ["--load_best_model_at_end", "true", "--save_strategy", "no"],
            "save and eval strategy to match",
        ),  # by Trainer
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--model_settings", "{"], "is neither JSON nor YAML"),
        (["--model_settings.projector", "["], "is neither JSON nor YAML"),
        (["--model_settings.vision_feature_layers", "[99]"], "must be ascending block numbers"),  # by KCFIConfig
        (["--vision_config", '{"model_type": "vit_mae"}'], "'vit_mae' cannot be the vision tower"),
        (["--vision_config", '{"model_type": "vitt"}'], "vitt"),
    ],
)
def test_settings_that_a_library_refuses_are_one_line(capsys, tmp_path, option, said):
    settings = {"--vision_config": '{"model_type": "vit"}', "--text_model": str(tmp_path), "--num_train_pairs": "1"}
    settings |= {"--output_dir": str(tmp_path / "run"), "--eval_strategy": "epoch"}
    settings |= dict(zip(option[::2], option[1::2], strict=True))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset: synthetic\nuse_cpu: true\nmetric_for_best_model: mask_f1\n")
    assert said in refusal(capsys, "train", recipe, *[text for setting in settings.items() for text in setting])


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors"])
def test_a_model_to_train_on_that_is_damaged_is_one_line(capsys, tmp_path, make_detector, broken):
    model = make_detector(tmp_path / "model")
    (model / broken).write_text('{"model_type": "kcfi", "flow_residual": "both"}')
    options = ["--model", model, "--output_dir", tmp_path / "run", "--use_cpu", "true"]
    assert main(["train", "debug", *map(str, options)]) == 2
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]  # behind the progress bar of loading
    assert last.startswith(f"kcfi: error: Cannot load the model '{model}' (")


def test_train_refuses_a_data_set_that_is_missing(capsys, tmp_path):
    options = ["--dataset", tmp_path / "nowhere", "--output_dir", tmp_path / "run"]
    assert refusal(capsys, "train", "debug", *options) == f"{tmp_path / 'nowhere'}: no such folder"


# ablate


def test_ablate_refuses_what_it_cannot_run_before_it_runs_anything(capsys, tmp_path):
    command = ["ablate", "ablations", "--no-meteor", "--output", tmp_path / "out", "--use_cpu", "--bf16", "false"]
    assert refusal(capsys, "ablate", "ablation", "--no-meteor").startswith("No set of recipes ablation: give a YAML")
    assert "Unknown row of" in refusal(capsys, *command, "--rows", "cfx") and not (tmp_path / "out").exists()
    assert "did you mean 'learning_rate'?" in refusal(capsys, *command, "--lerning_rate", "1")
    assert refusal(capsys, *command, "--seed", "1") == "--seed: every run has its own; choose --seeds and --output."
    assert "unrecognized arguments: --rows" in refusal(capsys, "score", "a.json", "--references", "b", "--rows")
    assert not (tmp_path / "out").exists()


# push


@pytest.fixture
def run(make_detector, tmp_path):
    """A folder as `kcfi train` leaves it."""
    folder = make_detector(tmp_path / "run", num_change_classes=2)
    save_recipe(parse_recipe("debug", ["--mask_classes", "change", "--use_cpu", "true"]), folder)
    (folder / "trainer_state.json").write_text(
        '{"global_step": 1, "epoch": 1, "best_metric": null, "log_history": []}'
    )
    return folder


def test_a_dry_run_writes_a_folder_that_captions(capsys, pair, run):
    assert main(["push", str(run), "me/kcfi-own", "--dry-run", "pushed", "--license", "mit"]) == 0
    assert capsys.readouterr().out == "pushed\n" and metadata_load("pushed/README.md")["license"] == "mit"
    answers = []
    for model in (str(run), "pushed"):
        assert main(["caption", *pair, "--model", model]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_push_asks_for_a_licence_that_does_not_follow(capsys, run, tmp_path):
    text = (run / "recipe.yaml").read_text().replace("model: kcfi-tiny", "model: nobody/nothing")
    (run / "recipe.yaml").write_text(text)
    message = refusal(capsys, "push", run, "me/kcfi-own", "--dry-run", tmp_path / "pushed")
    assert message.startswith("Give --license, ") and "(nobody/nothing: not known here)" in message


def test_push_refuses_what_is_no_finished_run(capsys, run, tmp_path, detector):
    def refused(folder, *more, repo_id="me/kcfi-own"):
        return refusal(capsys, "push", folder, repo_id, "--dry-run", tmp_path / "pushed", *more)

    assert refused(tmp_path / "nowhere").startswith(f"No run {tmp_path / 'nowhere'}: give the folder")
    assert f"{detector} has no recipe.yaml, so it is no finished run" in refused(detector)
    assert "nowhere.json: no such file" in refused(run, "--results", tmp_path / "nowhere.json")
    assert "'kcfi-own' names no owner" in refused(run, repo_id="kcfi-own")
    assert "Repo id must" in refused(run, repo_id="me/kcfi own")
    folder = ("--text-model", tmp_path)
    assert "where nobody else finds it: give its Hub id" in refusal(capsys, "push", run, "me/kcfi-own", *folder)
    (run / "config.json").write_text('{"model_type": "bert"}')
    assert refused(run) == f"{run} holds a model of type 'bert', not 'kcfi'."
    (tmp_path / "pushed").mkdir()
    (tmp_path / "pushed" / "mine.txt").touch()
    assert "is not an empty folder: choose a new one" in refused(run)
    assert [path.name for path in (tmp_path / "pushed").iterdir()] == ["mine.txt"]


def test_push_without_a_connection_is_one_line(run, environment):
    environment = {**environment, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens there
    command = [sys.executable, "-m", "kcfi_cli", "push", str(run), "me/kcfi-own"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 2 and process.stdout == ""
    last = process.stderr.splitlines()[-1]  # behind the progress bars
    assert last.startswith("kcfi: error: Cannot push to me/kcfi-own at http://127.0.0.1:9: ")


# Help, and the process as a whole


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["caption"],
        ["scene"],
        ["train"],
        ["evaluate"],
        ["score"],
        ["push"],
        ["export"],
        ["data", "synthesize"],
        ["data", "check"],
        ["data", "convert"],
        ["data", "materials"],
    ],
)
def test_help_shows_an_example(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert " ".join(["\n  kcfi" if not command else "kcfi", *command]) + " " in capsys.readouterr().out


@pytest.fixture(scope="module")
def environment():
    # DeepSpeed, where it is installed and finds no GPU, says so on stdout unless it is told
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def test_help_loads_nothing_but_the_standard_library(environment):
    code = (
        "import json, sys; loaded = set(sys.modules)\n"
        "from kcfi_cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(json.dumps(sorted(set(sys.modules) - loaded)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    more = {name.split(".")[0] for name in json.loads(process.stderr)}
    assert more - set(sys.stdlib_module_names) == {"kcfi_cli"}


def test_the_module_runs_and_prints_nothing_but_its_result(pair, detector, environment):
    command = [sys.executable, "-m", "kcfi_cli", "caption", *pair, "--model", str(detector), "--json"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0 and json.loads(process.stdout)["caption"]
    assert process.stderr == ""  # no warnings of libraries; a progress bar only for many tiles
    command[4] = "nowhere.png"
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "kcfi: error: nowhere.png: No such file or directory\n"
