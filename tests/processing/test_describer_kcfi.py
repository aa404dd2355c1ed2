"""Pairs of any size: tiles, blending, regions, and the sentences of the right places."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from transformers import pipeline

from kcfi.models import compiled_steps, load
from kcfi.processing import INSTRUCTIONS, Describer, describer_kcfi
from kcfi.processing.describer_kcfi import (
    MERGE,
    MIN_REGION,
    OVERLAP,
    blend,
    changed_regions,
    seen_from,
    taper,
    tile_boxes,
    tile_starts,
)
from kcfi.processing.places_kcfi import tells_of_change
from kcfi.processing.reading_kcfi import read_pair
from kcfi.training.collator import KCFICollator
from kcfi.training.load import load_pairs
from kcfi.training.scoring.evaluate import evaluate_model, predict
from kcfi_cli import main

SIDE = 32  # px: what the tiny model reads
SCENES = Path(__file__).parents[3] / "shared" / "data" / "real_pairs" / "scenes"


@pytest.fixture(scope="module")
def describer(detector):
    return Describer(*load(str(detector)))


def model_inputs(describer, before, after):
    return describer.processor.image_processor([[before, after]], return_tensors="pt")["pixel_values"]


# Tiles


@pytest.mark.parametrize("tile", [4, 7, 32])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 56, 57, 199])
def test_tiles_cover_every_pixel_and_overlap_their_neighbours(length, tile):
    starts = tile_starts(length, tile)
    covered = np.zeros(length, int)
    for start in starts:
        covered[start : start + tile] += 1
    assert starts[0] == 0 and covered.all()
    assert length <= tile or starts[-1] + tile == length
    for left, right in pairwise(starts):
        assert left + tile - right >= np.floor(tile * OVERLAP) and right > left


def test_one_tile_is_enough_up_to_its_size():
    assert tile_starts(32, 32) == tile_starts(5, 32) == [0]
    assert len(tile_starts(33, 32)) == 2
    assert tile_boxes(20, 40, 32) == [(0, 0, 20, 32), (0, 8, 20, 40)]


@pytest.mark.parametrize("length", [1, 2, 7, 32, 33])
def test_the_taper_is_even_and_never_0(length):
    weights = taper(length)
    assert len(weights) == length and torch.equal(weights, weights.flip(0))
    assert weights.min() > 0 and weights.max() <= 1
    assert (weights.diff()[: length // 2] >= 0).all()
    assert length < 7 or weights[length // 2] == 1


@pytest.mark.parametrize(("width", "height"), [(32, 32), (97, 61), (33, 211), (5, 71), (70, 1)])
def test_blended_tiles_of_a_picture_give_the_picture(width, height):
    picture = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    boxes = tile_boxes(width, height, SIDE)
    tiles = (picture[:, top:bottom, left:right] for left, top, right, bottom in boxes)
    torch.testing.assert_close(blend(tiles, boxes, picture.shape), picture, rtol=0, atol=1e-6)


def test_where_tiles_disagree_the_one_whose_middle_is_nearer_counts_more():
    boxes = tile_boxes(56, 32, SIDE)  # 0-32 and 24-56
    mixed = blend([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)], boxes, (1, 32, 56))[0, 0]
    assert (mixed[:24] == 0).all() and (mixed[32:] == 1).all()
    assert (mixed[24:32].diff() > 0).all() and mixed[27] < 0.5 < mixed[28]


# Regions


def test_regions_are_sorted_by_size_and_small_ones_left_out():
    mask = np.zeros((90, 120), np.uint8)
    mask[2:12, 3:13] = 1  # MIN_REGION px
    mask[50:70, 40:60] = 2
    mask[2:11, 100:111] = 1  # one px too few
    assert 9 * 11 == MIN_REGION - 1
    regions = changed_regions(mask)
    assert [(region.box, region.pixels) for region, _ in regions] == [((40, 50, 60, 70), 400), ((3, 2, 13, 12), 100)]
    for region, area in regions:
        left, top, right, bottom = region.box
        assert area.shape == (bottom - top, right - left) and area.all()


@pytest.mark.parametrize(("gap", "count"), [(2 * MERGE, 1), (2 * MERGE + 1, 2)])
def test_regions_grow_together_over_small_gaps_only(gap, count):
    mask = np.zeros((20, 70), np.uint8)
    mask[4:16, 2:22] = mask[4:16, 22 + gap : 42 + gap] = 1
    assert [region.pixels for region, _ in changed_regions(mask)] == [480 // count] * count


def test_no_change_has_no_region():
    assert changed_regions(np.zeros((9, 9), np.uint8)) == []


# Reading


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "F"])
def test_every_mode_looks_to_the_blend_as_to_the_model(describer, mode, tmp_path):
    before = Image.effect_noise((40, 20), 80).convert("RGB")
    before = before.convert(mode) if mode != "F" else before.convert("F").point(lambda value: value / 255 + 0)
    first, second = read_pair(before, before)
    assert (first.mode, first.size) == ("RGB", (40, 20)) and first.tobytes() == second.tobytes()
    assert torch.equal(model_inputs(describer, before, before), model_inputs(describer, first, first))


def test_different_sizes_are_one_error_that_names_both(tmp_path):
    Image.new("RGB", (12, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (12, 11)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"a\.png is 12 x 10 px, .*b\.png is 12 x 11 px\. They must show one place"):
        read_pair(tmp_path / "a.png", tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"in size: 12 x 10 px, 3 x 3 px"):
        read_pair(Image.new("RGB", (12, 10)), Image.new("RGB", (3, 3)))


def test_an_image_that_its_file_turns_is_described_upright(describer, tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    report = describer.describe(tmp_path / "turned.jpg", tmp_path / "turned.jpg")
    assert report.mask.shape == (40, 20)


# Description


@pytest.mark.parametrize(
    ("width", "height"), [(32, 32), (17, 11), (1, 1), (33, 32), (90, 61), (200, 5), (3, 70)], ids=str
)
def test_mask_and_heat_map_have_the_size_of_the_images(describer, make_pair, width, height):
    report = describer.describe(*make_pair(width, height))
    assert report.mask.shape == report.key_changes.shape == (height, width)
    assert report.mask.dtype == np.uint8 and np.isfinite(report.key_changes).all()
    assert report.changed_fraction == 0 and report.caption and report.regions == []


@pytest.mark.parametrize("size", [(32, 32), (20, 28)], ids=str)
def test_one_tile_is_what_the_pipeline_says(describer, make_pair, size):
    pair = make_pair(*size, square=(8, 8, 18, 24))
    report = describer.describe(*pair)
    expected = pipeline("change-captioning", model=describer.model, processor=describer.processor)(pair)
    assert report.caption == expected["caption"]
    assert np.array_equal(report.mask, np.asarray(expected["mask"])) and report.mask.any()
    assert report.changed_fraction == pytest.approx(expected["changed_fraction"])


def test_changes_are_found_where_they_are_in_a_large_image(describer, make_pair):
    squares = [(3, 2, 19, 18), (70, 40, 86, 56), (81, 2, 97, 14)]
    for square in squares:
        true = np.zeros((61, 97), bool)
        true[square[1] : square[3], square[0] : square[2]] = True
        report = describer.describe(*make_pair(97, 61, square))
        found = report.mask > 0
        assert (found & true).sum() / (found | true).sum() > 0.5
        assert report.changed_fraction == pytest.approx(found.mean())
        assert report.key_changes[true].mean() > 2 * report.key_changes[~true].mean()


def test_the_strip_that_fills_a_narrow_image_up_is_its_mirror_image(describer, make_pair):
    before, after = make_pair(50, 20, square=(30, 4, 46, 18))
    mirrored = [
        Image.fromarray(np.pad(np.asarray(image), ((0, 12), (0, 0), (0, 0)), "symmetric")) for image in (before, after)
    ]
    narrow, full = describer.describe(before, after), describer.describe(*mirrored)
    assert np.array_equal(narrow.mask, full.mask[:20]) and narrow.mask.any()


def test_the_sentence_is_that_of_the_tile_which_changed_most(describer, make_pair):
    before, after = make_pair(80, 32, square=(56, 6, 72, 26))
    boxes = tile_boxes(80, 32, SIDE)
    assert boxes[-1][0] == 48
    alone = describer.describe(before.crop(boxes[-1]), after.crop(boxes[-1]))
    first = describer.describe(before.crop(boxes[0]), after.crop(boxes[0]))
    assert describer.describe(before, after).caption == alone.caption != first.caption


def test_every_region_gets_the_sentence_of_its_own_surroundings(describer, make_pair):
    before, after = make_pair(120, 40, square=(8, 8, 24, 32))
    pixels = np.asarray(after).copy()
    pixels[4:36, 88:112] = (255, 255, 0)
    after = Image.fromarray(pixels)
    report = describer.describe(before, after, regions=True)
    components, count = ndimage.label(report.mask)
    assert len(report.regions) == count == 2
    assert [region.pixels for region in report.regions] == sorted(np.bincount(components.ravel())[1:], reverse=True)
    large, small = report.regions
    assert large.box[0] > 80 and small.box[2] < 40
    assert large.caption and small.caption and large.caption != small.caption
    middle = ((large.box[0] + large.box[2]) // 2, (large.box[1] + large.box[3]) // 2)
    window = (middle[0] - 16, middle[1] - 16, middle[0] + 16, middle[1] + 16)
    assert large.caption == describer.describe(before.crop(window), after.crop(window)).caption


def test_a_larger_tile_is_shrunk_to_the_models_input(detector, make_pair):
    model, processor = load(str(detector))
    pair = make_pair(64, 64, square=(16, 16, 48, 48))
    coarse = Describer(model, processor, tile=64).describe(*pair)
    expected = pipeline("change-captioning", model=model, processor=processor)(pair, tile=64)
    assert coarse.caption == expected["caption"] and np.array_equal(coarse.mask, np.asarray(expected["mask"]))
    with pytest.raises(ValueError, match="A tile of 7 px is smaller than a patch of the vision tower, 8 px"):
        Describer(model, processor, tile=7)


def test_a_processor_that_crops_loses_no_border_here(describer, detector, make_pair):
    model, processor = load(str(detector))
    processor.image_processor.size = {"shortest_edge": 40}
    processor.image_processor.crop_size, processor.image_processor.do_center_crop = {"height": 32, "width": 32}, True
    pair = make_pair(60, 45, square=(0, 0, 16, 16))
    assert np.array_equal(Describer(model, processor).describe(*pair).mask, describer.describe(*pair).mask)


def test_without_a_head_there_is_a_sentence_and_no_mask(make_detector, tmp_path, make_pair):
    folder = make_detector(tmp_path, use_change_detection_head=False)
    describer = Describer(*load(str(folder)))
    before, after = make_pair(80, 32, square=(56, 6, 72, 26))
    report = describer.describe(before, after)
    assert report.mask is None and report.classes is None and report.key_changes.shape == (32, 80)
    box = (48, 0, 80, 32)  # the tile whose key change features are strongest
    assert report.caption == describer.describe(before.crop(box), after.crop(box)).caption
    with pytest.raises(ValueError, match="no change detection head: it cannot find regions"):
        describer.describe(before, after, regions=True)


@pytest.mark.parametrize("size", [32, 80])
def test_every_pixel_has_a_likeliest_class_of_change(describer, make_pair, size):
    pair = make_pair(size, size, (0, 0, size // 2, size // 2))
    report = describer.describe(*pair)
    marked = report.mask > 0
    assert marked.any() and not marked.all() and set(np.unique(report.classes)) <= {1, 2}
    assert report.classes.dtype == np.uint8 and np.array_equal(report.classes[marked], report.mask[marked])
    if describer.fits(pair[0]):
        [(logits, _)] = describer.mask_logits([pair])
        assert np.array_equal(report.classes, 1 + logits[1:].argmax(0).numpy())


def test_an_area_is_seen_from_another_box():
    area = np.ones((4, 6), bool)
    seen = seen_from((10, 10, 20, 20), (8, 17, 14, 21), area)
    expected = np.zeros((10, 10), bool)
    expected[7:, :4] = True
    assert np.array_equal(seen, expected)
    assert not seen_from((10, 10, 20, 20), (30, 30, 36, 34), area).any()


# One way for all


GEOMETRIES = {  # pairs of 40 px
    "paper": {"side": 40},  # read as they are
    "released": {"side": 32, "shortest_edge": 40},  # the centre of 32 px
    "shrunk": {"side": 32},  # as 256 px are resized to the 252 or 224 px of a tower
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_command_evaluation_validation_and_pipeline_say_the_same(make_detector, make_pair, tmp_path, capsys, geometry):
    model = make_detector(tmp_path / "model", tile_size=40, **GEOMETRIES[geometry])
    pairs = {f"pair_{number}.png": make_pair(40, 40, (4 + 5 * number, 9, 20 + 5 * number, 30)) for number in range(3)}
    folders = {name: tmp_path / "set" / "images" / "test" / name for name in ("A", "B", "label")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    entries = []
    for name, pair in pairs.items():
        for folder, image in zip(("A", "B"), pair, strict=True):
            image.save(folders[folder] / name)
        entries.append({"filename": name, "split": "test", "changeflag": 1, "sentences": [{"raw": "a house ."}]})
    (tmp_path / "set" / "LevirCCcaptions.json").write_text(json.dumps({"images": entries}))

    arguments = ["caption", str(folders["A"]), str(folders["B"]), "--model", str(model), "--json"]
    capsys.readouterr()  # what imports have said
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    rows = {f"{row['name']}.png": row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert len({row["caption"] for row in rows.values()}) == 3
    for name, row in rows.items():  # the command's masks become the truth
        shutil.copy(tmp_path / "out" / row["mask"], folders["label"] / name)

    results = tmp_path / "results.json"
    evaluate_model(str(model), str(tmp_path / "set"), "test", results, meteor=False, batch_size=2)
    assert json.loads((tmp_path / "predictions.json").read_text()) == {
        name: row["caption"] for name, row in rows.items()
    }
    f1 = json.loads(results.read_text())["mask"]["f1"]
    assert f1["building"] == 100

    captioner = pipeline("change-captioning", model=str(model))
    network, processor = load(str(model))
    batch = KCFICollator(processor, "road_building", train=False)(load_pairs(str(tmp_path / "set"), "test"))
    with torch.no_grad():
        features = network.get_image_features(batch["pixel_values"])
        validation = {pair.filename: pair for pair in predict(network, processor, batch, features, 64)}
    for name, row in rows.items():
        result = captioner([str(folders[folder] / name) for folder in ("A", "B")])
        assert result["caption"] == row["caption"] == validation[name].caption
        assert result["changed_fraction"] == pytest.approx(row["changed_fraction"]) and row["changed_fraction"] > 0
        ids, seen = np.asarray(result["mask"]), np.asarray(result["mask"]) != 255
        assert np.array_equal(ids, validation[name].mask) and seen.all() == (geometry != "released")
        assert np.array_equal((ids > 0) & seen, np.asarray(Image.open(tmp_path / "out" / row["mask"])) > 0)


def test_tiles_of_a_cropping_model_are_what_it_sees_of_a_training_image(make_detector, make_pair, tmp_path):
    describer = Describer(*load(str(make_detector(tmp_path, shortest_edge=40, tile_size=80))))
    assert (describer.tile, describer.view) == (80, 64)  # 80 px become 40, of which the model sees 32
    pair = make_pair(200, 150, square=(130, 10, 170, 50))
    report = describer.describe(*pair)
    assert (report.mask != 255).all() and report.mask[12:48, 132:168].all()
    assert report.caption_box[2] - report.caption_box[0] == 64
    border = describer.describe(*make_pair(80, 80, square=(0, 0, 20, 20)))
    assert (border.mask[:8] == 255).all() and (border.mask[8:72, 8:72] != 255).all()
    assert border.changed_fraction == pytest.approx((border.mask == 2).sum() / 64**2)


def test_several_sentences_of_a_pair_are_refused(describer):
    with pytest.raises(ValueError, match="num_return_sequences=3: a pair gets one sentence"):
        Describer(describer.model, describer.processor, num_beams=3, num_return_sequences=3)


def test_settings_of_reading_that_are_saved_with_the_processor_count(detector):
    model, processor = load(str(detector))
    four = np.random.default_rng(0).integers(0, 255, (4, 32, 32), dtype=np.uint8)
    with pytest.raises(ValueError, match="4 bands"):
        Describer(model, processor).describe(four, four)
    processor.image_processor.bands = [1, 2, 3]
    describer = Describer(model, processor)
    assert describer.describe(four, four).caption == describer.describe(four[:3], four[:3]).caption
    captioner = pipeline("change-captioning", model=model, processor=processor)
    assert captioner([four, four])["caption"] == describer.describe(four, four).caption
    with pytest.raises(ValueError, match="asks for another"):
        captioner([four, four], reading={"bands": [1, 2, 5]})


def test_the_question_and_the_arguments_of_generate_reach_the_model(describer, make_pair):
    pair = make_pair(32, 32, square=(2, 2, 20, 20))
    model, processor = describer.model, describer.processor
    plain, asked, short = (
        Describer(model, processor, **settings).describe(*pair).caption
        for settings in ({}, {"instruction": INSTRUCTIONS[3]}, {"max_new_tokens": 3})
    )
    assert plain != asked and plain.startswith(short) and len(short) <= 3


# Places and contradictions


CORNERS = {"top left": (0, 0), "top right": (512, 0), "bottom left": (0, 512), "bottom right": (512, 512)}


@pytest.mark.parametrize(
    "corner", [pytest.param(name, marks=[pytest.mark.slow] * (name != "top left")) for name in CORNERS]
)
def test_the_place_in_the_sentence_is_the_place_in_the_scene(corner):
    """A building appears in one corner of a scene of nine tiles; the embedded model names a corner of its tile."""
    example = load_pairs("synthetic", "test", 166)[165]
    tiles = [example[key] for key in ("image_before", "image_after")]
    describer = Describer(*load("kcfi-tiny"))
    assert "in the top right corner" in describer.describe(*tiles).caption
    before = Image.new("RGB", (768, 768))
    for x in (0, 256, 512):
        for y in (0, 256, 512):
            before.paste(tiles[0], (x, y))
    after, (left, top) = before.copy(), CORNERS[corner]
    after.paste(tiles[1], (left, top))
    report = describer.describe(before, after, regions=True)
    assert f"in the {corner} corner" in report.caption
    assert report.caption_box[0] <= left + 220 <= report.caption_box[2]
    assert report.caption_box[1] <= top + 40 <= report.caption_box[3]
    assert all("corner" not in region.caption or corner in region.caption for region in report.regions)
    assert report.regions


def test_regions_of_a_small_image_have_sentences_of_their_own(make_detector, make_pair, tmp_path):
    describer = Describer(*load(str(make_detector(tmp_path, tile_size=64))))
    before, after = make_pair(64, 64, square=(0, 0, 30, 30))
    pixels = np.asarray(after).copy()
    pixels[48:, 48:] = (255, 255, 0)
    pair = (before, Image.fromarray(pixels))
    report = describer.describe(*pair, regions=True)
    assert len(report.regions) == 2 and len({report.caption, *(region.caption for region in report.regions)}) == 3
    stages = describer._stages([pair], as_trained=True)
    view = torch.zeros(32, 32, dtype=torch.bool)
    view[:15, :15] = True  # of 4 x 4 patches the first 2 x 2, and those around them
    for old, new, only in zip(*stages, describer._only(stages, view[None])[1], strict=True):
        assert torch.equal(only[..., :3, :3], new[..., :3, :3]) and not torch.equal(new, old)
        assert torch.equal(only[..., 3, :], old[..., 3, :]) and torch.equal(only[..., 3], old[..., 3])


def test_a_marked_region_never_says_that_nothing_changed(describer, make_pair, monkeypatch):
    scene = make_pair(100, 70, square=(64, 8, 92, 30))
    expected = describer.describe(*scene, regions=True)
    monkeypatch.setattr(describer_kcfi, "tells_of_change", lambda sentence: sentence != expected.caption)
    report = describer.describe(*scene, regions=True)
    for told in (report, *report.regions):
        assert told.caption != expected.caption and told.score is not None  # the next likeliest sentence
    monkeypatch.setattr(describer_kcfi, "tells_of_change", lambda sentence: False)
    report = describer.describe(*scene, regions=True)
    for told in (report, *report.regions):  # all deny it: the mask speaks
        assert (told.caption, told.score) == ("a building has changed in the top right corner .", None)
    small = make_pair(32, 32, square=(2, 2, 20, 20))
    as_written = describer.describe(*small)
    assert as_written.mask.any() and as_written.score is not None  # what is scored stays the model's own


@pytest.mark.skipif(not SCENES.is_dir(), reason="no real scenes at hand")
@pytest.mark.slow
def test_no_region_of_real_scenes_contradicts_its_mask():
    describer = Describer(*load("kcfi-tiny"))
    regions = []
    for name in ("test_1.png", "test_2.png"):
        regions += describer.describe(SCENES / "A" / name, SCENES / "B" / name, regions=True).regions
    assert len(regions) > 10 and all(tells_of_change(region.caption) for region in regions)


INDUCTOR = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="on a CPU inductor needs a C++ compiler"),
]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=INDUCTOR)])
def test_compiled_steps_write_the_same_sentences(describer, detector, make_pair, monkeypatch, backend):
    monkeypatch.setattr("kcfi.processing.describer_kcfi.LONGEST", 12)
    pairs = [tuple(make_pair(32, 32, square=(number, 2, 8 + 3 * number, 18))) for number in range(5)]
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = Describer(*load(str(detector)), batch_size=3, **compiled_steps())
    compiled.generation["compile_config"].backend = backend
    sentences, expected = ([report.caption for report in each.describe_pairs(pairs)] for each in (compiled, describer))
    assert graphs["unique_graphs"] >= 1
    assert sentences == expected and len(set(sentences)) > 1


@pytest.mark.parametrize("context", ["after", "bitemporal"])
def test_the_heat_map_shows_changes_and_not_their_context(make_detector, tmp_path, make_pair, context):
    describer = Describer(*load(str(make_detector(tmp_path, change_context=context))))
    report = describer.describe(*make_pair(32, 32))
    assert (report.key_changes == 0).all()  # equal images; the context alone is far from 0
