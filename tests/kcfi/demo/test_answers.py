"""What is shown of a pair: masks by threshold, areas, text that cannot become markup, the zip."""

import io
import itertools
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from kcfi.demo.answers import (
    SHOWN,
    areas,
    areas_html,
    describe_pair,
    mask_at,
    overlay_at,
    sentence_html,
    views,
    without_folders,
    write_zip,
)
from kcfi.models import load
from kcfi.pictures import overlay
from kcfi.processing import Describer

EVIL = '<img src=x onerror="alert(1)"> ${alert(2)} & </p>'


@pytest.fixture(scope="module")
def describer(detector):
    return Describer(*load(str(detector), device="cpu"))


@pytest.fixture
def answer(describer, make_pair, tmp_path):
    """A pair of which the left half changed, as files."""
    paths = [tmp_path / f"{date}.png" for date in ("before", "after")]
    for image, path in zip(make_pair(96, 64, (0, 0, 48, 64)), paths, strict=True):
        image.save(path)
    return describe_pair(describer, *map(str, paths), "tiny")


def test_the_answer_is_that_of_the_describer(describer, answer, make_pair):
    report = describer.describe(*make_pair(96, 64, (0, 0, 48, 64)))
    assert answer.report.caption == report.caption and answer.report.changed_probability == report.changed_probability
    assert np.array_equal(answer.report.mask, report.mask) and answer.names == ("road", "building")
    assert (report.mask == 2).any() and answer.size == 16 * 96 * 64


def test_the_mask_in_the_middle_is_that_of_kcfi_caption_where_no_third_class_decides(answer):
    assert np.array_equal(mask_at(answer.report, 0.5), answer.report.mask)


def test_a_higher_threshold_marks_less_and_never_anything_else(answer):
    masks = [mask_at(answer.report, threshold) > 0 for threshold in np.linspace(0, 1, 21)]
    assert masks[0].all() and not masks[-1].all() and masks[10].any()
    assert all((low | ~high).all() for low, high in itertools.pairwise(masks))
    marked = np.unique(mask_at(answer.report, 0)).tolist()
    assert set(marked) <= {1, 2}  # classes of change, also where nothing is the likeliest


def test_pixels_that_the_model_did_not_see_are_never_marked_nor_counted(answer):
    mask = answer.report.mask.copy()
    mask[:8] = 255
    unseen = replace(answer, report=replace(answer.report, mask=mask))
    assert (mask_at(unseen.report, 0)[:8] == 255).all()
    assert sum(row["pixels"] for row in areas(unseen, 0)) == 56 * 96
    assert sum(row["share"] for row in areas(unseen, 0)) == pytest.approx(1)
    assert np.array_equal(np.asarray(overlay_at(unseen, 0))[:6], np.asarray(answer.after)[:6])


def test_areas_are_counted_on_the_mask(answer):
    rows = areas(replace(answer, metres=0.5), 0.5)
    assert [row["class"] for row in rows] == ["road", "building"]
    assert rows[1]["pixels"] == (answer.report.mask == 2).sum() and rows[1]["m2"] == rows[1]["pixels"] / 4
    assert rows[1]["share"] == pytest.approx(answer.report.changed_fraction)
    assert areas(replace(answer, metres=None), 0.5)[1]["m2"] is None
    assert "m²" in areas_html(replace(answer, metres=0.5), 0.5, "/x") and "m²" not in areas_html(answer, 0.5, "/x")


def test_the_views_are_both_dates_and_the_mask_can_be_left_out(answer):
    before, after = views(answer, 0.5, masked=False)
    assert np.array_equal(before, answer.before) and np.array_equal(after, answer.after)
    _, marked = views(answer, 0.5, masked=True)
    assert np.array_equal(marked, overlay(answer.after, answer.report.mask)) and not np.array_equal(marked, after)


def test_large_images_are_shown_reduced_and_stay_as_they_are(answer):
    large = Image.new("RGB", (SHOWN * 2, SHOWN))
    grown = replace(answer, before=large, after=large)
    assert [image.size for image in views(grown, 0.5, masked=False)] == [(SHOWN, SHOWN // 2)] * 2
    assert grown.before.size == (SHOWN * 2, SHOWN)


def test_words_of_the_model_and_of_names_are_text(answer):
    evil = replace(answer, report=replace(answer.report, caption=EVIL), names=(EVIL, EVIL))
    for text in (sentence_html(evil), areas_html(evil, 0.5, '/x"><script>')):
        assert "<img" not in text and "<script" not in text and "&lt;" in text
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in sentence_html(evil)


def test_the_sentence_says_how_sure_it_is_and_of_which_part_it_tells(answer):
    report = replace(
        answer.report, caption="a road .", score=0.456, changed_probability=0.789, caption_box=(0, 0, 96, 64)
    )
    text = sentence_html(replace(answer, report=report))
    assert "a road ." in text and "46%" in text and "79%" in text and "part" not in text
    part = sentence_html(replace(answer, report=replace(report, caption_box=(8, 0, 40, 32), score=None)))
    assert "x 8 to 40, y 0 to 32" in part and "words" not in part


def test_the_zip_holds_what_is_shown(answer):
    content = io.BytesIO()
    write_zip(answer, 0.3, content)
    with zipfile.ZipFile(content) as archive:
        assert archive.testzip() is None
        files = {name: archive.read(name) for name in archive.namelist()}
    pictures = {name: Image.open(io.BytesIO(files[f"{name}.png"])) for name in ("before", "after", "overlay", "mask")}
    assert np.array_equal(pictures["before"], answer.before) and np.array_equal(pictures["after"], answer.after)
    assert np.array_equal(pictures["overlay"], overlay_at(answer, 0.3))
    assert np.array_equal(np.asarray(pictures["mask"]) == 255, mask_at(answer.report, 0.3) == 2)
    shown = np.asarray(Image.open(io.BytesIO(files["probability.png"]))) / 255
    assert np.abs(shown - answer.report.probabilities).max() <= 0.5 / 255 + 1e-6
    told = json.loads(files["answer.json"])
    assert told["caption"] == answer.report.caption and told["threshold"] == 0.3 and told["model"] == "tiny"
    assert told["areas"] == areas(answer, 0.3) and len(files) == 6


def test_messages_name_files_without_their_folders():
    text = "/tmp/a/b/one.png is 3 px, /tmp/a/c/two.png is 4 px."
    assert without_folders(text, "/tmp/a/b/one.png", "/tmp/a/c/two.png") == "one.png is 3 px, two.png is 4 px."
