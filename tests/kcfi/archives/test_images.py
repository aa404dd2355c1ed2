"""Pairs of images -> rows: the same as for single pairs, whatever goes together."""

import numpy as np
import pytest
from PIL import Image

from kcfi.archives import images
from kcfi.archives.images import describe_images
from kcfi.archives.job import Job
from kcfi.archives.pairs import find_pairs
from kcfi.models import load
from kcfi.processing import Describer, describer_kcfi
from tests.kcfi.archives.conftest import SIZES


@pytest.fixture(scope="module")
def describer(detector):
    return Describer(*load(str(detector)), batch_size=3)


@pytest.fixture
def pairs(folders):
    (folders / "out").mkdir()
    return find_pairs(folders / "A", folders / "B").to_pylist()


def test_a_list_gets_what_single_pairs_get(describer, folders, pairs):
    job, output = Job({}, regions=True, heatmap=True), folders / "out"
    results = list(describe_images(pairs, describer, job, output))
    for pair, row in zip(pairs, results, strict=True):
        alone = describer.describe(pair["before"], pair["after"], regions=True)
        assert row["caption"] == alone.caption and "error" not in row
        assert row["changed_fraction"] == pytest.approx(alone.changed_fraction, abs=0.01) and alone.changed_fraction
        assert (np.asarray(Image.open(output / row["mask"])) > 0).mean() == pytest.approx(row["changed_fraction"])
        assert [region["caption"] for region in row["regions"]] == [region.caption for region in alone.regions]
        sizes = {Image.open(path).size for path in (output / row["heatmap"], output / row["overlay"], pair["after"])}
        assert len(sizes) == 1 and row["caption_box"] == list(alone.caption_box)
    assert results[3]["caption_box"] != [0, 0, 70, 45] and len(list(output.iterdir())) == 3 * len(SIZES)


def test_without_pictures_the_rest_is_the_same(describer, folders, pairs):
    with_them = list(describe_images(pairs, describer, Job({}), folders / "out"))
    (folders / "none").mkdir()
    without = list(describe_images(pairs, describer, Job({}, pictures=False), folders / "none"))
    assert without == [{k: v for k, v in row.items() if k not in ("mask", "overlay")} for row in with_them]
    assert list((folders / "none").iterdir()) == []


@pytest.mark.parametrize(
    ("at_once", "expected"),  # three pairs; the large one: six tiles and, again, the one that changed most
    [(8, [3, 3, 3, 1, 3]), (2, [2, 1, 2, 1, 2, 1, 1, 2, 1])],
)
def test_small_pairs_are_encoded_together_and_once(describer, folders, pairs, monkeypatch, at_once, expected):
    monkeypatch.setattr(describer_kcfi, "ENCODED_BY_CPU", at_once)
    encoded = []
    encode = describer.model.model.get_stage_features

    def count(pixel_values):
        encoded.append(len(pixel_values))
        return encode(pixel_values)

    monkeypatch.setattr(describer.model.model, "get_stage_features", count)
    assert len(list(describe_images(pairs, describer, Job({}), folders / "out"))) == len(SIZES)
    assert encoded == expected


def test_a_sentence_of_two_lines_becomes_one(describer, folders, pairs, monkeypatch):
    def write(features):
        return ["ein Haus\n fällt weg"] * len(features.pooler_output), [0.5] * len(features.pooler_output)

    monkeypatch.setattr(describer, "_write", write)
    results = describe_images(pairs[:3], describer, Job({}), folders / "out")
    assert [row["caption"] for row in results] == ["ein Haus fällt weg"] * 3


def test_what_cannot_be_read_is_an_error_in_its_place(describer, folders, pairs):
    (folders / "B" / "pair_1.png").write_bytes(b"no image")
    pairs[4]["before"] = "http://127.0.0.1:9/a.png"
    results = list(describe_images(pairs, describer, Job({}), folders / "out"))
    assert [number for number, row in enumerate(results) if "error" in row] == [1, 4]
    assert results[1] == {"error": results[1]["error"]} and "pair_1.png: cannot be read" in results[1]["error"]
    assert results[4]["error"].startswith("http://127.0.0.1:9/a.png: cannot be fetched")
    limited = describe_images(pairs[:1], describer, Job({}, {"max_image_pixels": 1000}), folders / "out")
    assert "more than max_image_pixels, 1000" in next(limited)["error"]


def test_pairs_by_url_get_the_rows_of_their_files(describer, folders, pairs):
    remote = [{**pair, **{date: f"file://{pair[date]}" for date in ("before", "after")}} for pair in pairs]
    told = list(describe_images(remote, describer, Job({}), folders / "out"))
    assert told == list(describe_images(pairs, describer, Job({}), folders / "out"))


def test_pairs_stay_in_order_and_only_some_are_opened_ahead(describer, folders, pairs, monkeypatch):
    opened = []
    read = images.read_pair
    monkeypatch.setattr(images, "read_pair", lambda *paths, **more: opened.append(paths) or read(*paths, **more))
    reader = images._opened(pairs, describer, Job({}))
    assert next(reader)[0] == pairs[0]
    assert len(opened) <= 2  # of a CPU: the one that is given out, and the next
    assert [row for row, _ in reader] == pairs[1:] and len(opened) == len(pairs)


def test_a_bug_is_no_pair_that_cannot_be_read(describer, folders, pairs, monkeypatch):
    def fails(*_, **reading):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(images, "read_pair", fails)
    with pytest.raises(ValueError, match="broadcast"):
        list(describe_images(pairs, describer, Job({}), folders / "out"))
