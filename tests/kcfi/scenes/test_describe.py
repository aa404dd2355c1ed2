"""`describe_scene` from end to end, on pairs of all sorts; stopped and resumed."""

import json

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from PIL import Image

from kcfi.models import embedded_model, load
from kcfi.processing import Describer, InputError
from kcfi.scenes import compare, describe_scene
from kcfi.scenes.describe import WORK, digest
from kcfi.training.synthetic.dataset import SyntheticDataset

UTM = Affine(0.5, 0, 500_000, 0, -0.5, 4_400_000)
SQUARE = (96, 40, 128, 72)  # px, four patches of the detector a side


@pytest.fixture
def describer(detector):
    return Describer(*load(str(detector)), batch_size=3)


@pytest.fixture
def scene(tmp_path, write_raster, make_pair):
    """Files of a pair of 150 x 131 px; a square in its east changes."""

    def build(name="scene", square=SQUARE, size=(150, 131), convert=lambda pixels: pixels, **settings):
        folder = tmp_path / name
        folder.mkdir()
        pair = (convert(np.array(image)) for image in make_pair(*size, square))
        return [write_raster(folder / f"{n}.tif", p, **settings) for n, p in zip("ab", pair, strict=True)]

    return build


def is_square(bounds):
    """Whether bounds in pixels are those of the square, to the patch of 8 px that the detector marks."""
    return np.abs(np.subtract(bounds, SQUARE)).max() < 8


def in_pixels(polygon):
    """Bounds of a polygon on the grid `UTM`."""
    left, bottom, right, top = polygon.bounds
    return [*(~UTM @ (left, top)), *(~UTM @ (right, bottom))]


def files(output):
    return {path.name: path.read_bytes() for path in (output / WORK).iterdir() if path.is_file()}


def test_a_scene_becomes_findings_and_rasters(scene, describer, tmp_path):
    dates = scene()
    found = describe_scene(dates, tmp_path / "out", describer)
    [change] = found.changes
    assert (change.id, change.label, change.place) == (1, "building", "east") and is_square(change.box)
    assert is_square(in_pixels(change.polygon)) and change.area_m2 == change.pixels / 4 and change.probability > 0.5
    assert (change.before, change.after, change.first_seen) == ("a", "b", "b") and change.caption
    assert (
        found.caption.startswith("1 change: buildings ") and f"({change.area_m2:.0f} m2) in the east." in found.caption
    )
    assert found.seen_pixels == 150 * 131 and found.labels == {1: "road", 2: "building"}
    assert [date.path for date in found.dates] == [str(path) for path in dates] and found.shifts[0].windows == 1
    assert found.settings["model"].endswith("detector0") and found.settings["tile_px"] == 32
    assert found.settings["model_resolution_m"] == 0.5
    assert set(found.versions) == {"kcfi", "torch", "transformers", "rasterio"}
    assert found.warnings == ("The model does not say at how many m per pixel it was trained; 0.5 was taken.",)
    json.dumps([found.settings, found.versions])
    with rasterio.open(tmp_path / "out" / WORK / "mask.tif") as mask:
        assert (mask.crs, mask.transform, mask.nodata) == (found.grid.crs, UTM, 255)
        values = mask.read(1)
        assert (values[40:72, 96:128] == 2).all() and (values > 0).sum() == change.pixels
    with rasterio.open(tmp_path / "out" / WORK / "probability.tif") as probability:
        assert probability.scales == (0.01,) and (probability.read(1)[40:72, 96:128] >= 50).all()
    for number, path in enumerate(dates):
        with rasterio.open(path) as file, Image.open(tmp_path / "out" / WORK / f"date-{number}.png") as picture:
            assert np.array_equal(np.asarray(picture), file.read().transpose(1, 2, 0))


def test_no_change_is_said(scene, describer, tmp_path):
    found = describe_scene(scene(square=None), tmp_path / "out", describer)
    assert found.changes == () and found.caption == "No change was found."


DEGREES = Affine(0.5 / 85_390, 0, 116, 0, -0.5 / 111_035, 40)
KINDS = {
    "geographic": {"crs": "EPSG:4326", "transform": DEGREES},
    "local": {"crs": 'LOCAL_CS["site",UNIT["metre",1]]', "transform": Affine(0.5, 0, 0, 0, -0.5, 0)},
    "16 bit": {"convert": lambda pixels: pixels.astype(np.uint16) * 40 + 200},
    "float": {"convert": lambda pixels: (pixels / 255).astype(np.float32)},
    "4 bands": {"convert": lambda pixels: np.dstack([pixels[..., ::-1], pixels[..., 0]]), "bands": [3, 2, 1]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_change_is_found_in_every_kind_of_raster(scene, describer, tmp_path, kind):
    settings = dict(KINDS[kind])
    bands = settings.pop("bands", None)
    alpha = {"alpha": "unspecified"} if bands else {}
    size = (400, 300)  # of which the square is less than 2 %, so that the stretch does not count it
    found = describe_scene(scene(size=size, **settings, **alpha), tmp_path / "out", describer, bands=bands)
    [change] = found.changes
    assert is_square(change.box) and change.area_m2 == pytest.approx(change.pixels / 4, rel=0.02)
    assert bool(found.dates[0].notes) == (kind in ("16 bit", "float"))


def test_plain_images_are_compared_in_pixels(describer, tmp_path, make_pair):
    for name, image in zip("ab", make_pair(150, 131, SQUARE), strict=True):
        image.save(tmp_path / f"{name}.png")
    found = describe_scene([tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out", describer)
    [change] = found.changes
    assert is_square(change.polygon.bounds) and change.area_m2 is None and found.grid.crs is None
    assert f"in 1 place ({change.pixels:,} px) in the east." in found.caption


def test_dates_of_other_grids_are_compared_where_they_overlap(scene, describer, tmp_path, write_raster, make_pair):
    first, _ = scene()
    after = np.array(make_pair(150, 131, SQUARE)[1])[10:, 20:].repeat(2, 0).repeat(2, 1)  # 0.25 m, another extent
    fine = write_raster(tmp_path / "fine.tif", after, transform=UTM @ Affine.translation(20, 10) @ Affine.scale(0.5))
    found = describe_scene([first, fine], tmp_path / "out", describer)
    [change] = found.changes
    assert (found.grid.width, found.grid.height) == (130, 121)
    assert is_square(in_pixels(change.polygon))
    assert found.dates[1].notes == ("resampled from 0.25 to 0.5 m/px",)


def test_pixels_without_data_are_in_no_area(scene, describer, tmp_path, write_raster):
    before, after = scene(nodata=0)
    with rasterio.open(after, "r+") as file:
        pixels = file.read()
        pixels[:, :, 112:] = 0  # half of the square
        file.write(pixels)
    found = describe_scene([before, after], tmp_path / "out", describer)
    [change] = found.changes
    assert change.box[2] == 112 and change.pixels <= 16 * 48 and found.seen_pixels == 112 * 131
    unnamed = scene("unnamed")
    with rasterio.open(unnamed[1], "r+") as file:
        file.write(pixels)
    [border] = describe_scene(unnamed, tmp_path / "all", describer).changes
    assert border.box[1] == 0 and border.box[2:] == (150, 131)  # which counts as data
    same = describe_scene(unnamed, tmp_path / "named", describer, nodata=0)
    assert same.changes[0].pixels == change.pixels and same.settings["nodata"] == 0
    with rasterio.open(after, "r+") as file:
        file.write(np.zeros_like(pixels))
    with pytest.raises(InputError, match=r"a\.tif and .*b\.tif have no pixel with data on both"):
        describe_scene([before, after], tmp_path / "none", describer)


def test_coarse_images_are_warned_of(scene, describer, tmp_path):
    dates = scene(size=(40, 40), square=None, transform=UTM @ Affine.scale(4))
    warning = describe_scene(dates, tmp_path / "out", describer).warnings[1]
    assert "has 2 m per pixel, the model was trained at 0.5" in warning


def test_what_may_stop_a_run_is_said_before_it_begins(scene, describer, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kcfi.scenes.describe.compare", stop)
    dates = scene(size=(40, 40), square=None, transform=UTM @ Affine.scale(4))  # 160 px of 0.5 m, 7 tiles a side
    for many, said in ((48, True), (49, False)):
        monkeypatch.setattr("kcfi.scenes.describe.MANY", many)
        with pytest.raises(KeyboardInterrupt):
            describe_scene(dates, tmp_path / "out", describer, acquired=["2024-05-30", "2019-06-01"])
        told = capsys.readouterr().err
        assert "has 2 m per pixel" in told and "are not in order of time" in told
        assert ("49 tiles are read." in told) == said


def test_only_so_many_sentences_are_written(describer, tmp_path, scene, monkeypatch):
    found = describe_scene(scene(), tmp_path / "out", describer, max_captions=0)
    assert [change.caption for change in found.changes] == ["a building has changed in the east of the scene ."]
    assert found.changes[0].kind == "changed"


def test_a_region_whose_sentence_tells_of_no_change_gets_that_of_the_mask(scene, describer, tmp_path, monkeypatch):
    def tell(told, *_):
        for each in told:
            each.report.caption = "there is no difference ."

    monkeypatch.setattr(describer, "tell", tell)
    [change] = describe_scene(scene(), tmp_path / "out", describer).changes
    assert change.caption == "a building has changed in the east of the scene ."


def test_the_least_area_is_in_square_metres(scene, describer, tmp_path):
    dates = scene()
    [change] = describe_scene(dates, tmp_path / "out", describer).changes
    assert len(describe_scene(dates, tmp_path / "out", describer, min_area=change.area_m2).changes) == 1
    assert len(describe_scene(dates, tmp_path / "out", describer, min_area=change.area_m2 + 1).changes) == 0


@pytest.mark.parametrize("calls", [0, 3, 11, 18])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(scene, detector, tmp_path, monkeypatch, calls):
    dates, model = scene(), load(str(detector))
    whole = describe_scene(dates, tmp_path / "whole", Describer(*model, batch_size=2))
    counted = 0

    def stopping(method):
        def run(self, *arguments, **settings):
            nonlocal counted
            if counted == calls:
                raise KeyboardInterrupt
            counted += 1
            return method(self, *arguments, **settings)

        return run

    with monkeypatch.context() as patch:
        for name in ("tile_maps", "tell"):
            patch.setattr(Describer, name, stopping(getattr(Describer, name)))
        with pytest.raises(KeyboardInterrupt):
            describe_scene(dates, tmp_path / "stopped", Describer(*model, batch_size=2))
    done = len(list((tmp_path / "stopped" / WORK / "strips").glob("*.npz")))
    assert (done > 0) == (calls >= 3) and not files(tmp_path / "stopped").keys() & {"date-0.png"}
    rows = []
    detect = compare.detect
    monkeypatch.setattr(compare, "detect", lambda *given: map(lambda strip: rows.append(1) or strip, detect(*given)))
    again = describe_scene(dates, tmp_path / "stopped", Describer(*model, batch_size=2))
    assert files(tmp_path / "stopped") == files(tmp_path / "whole") and again == whole and len(rows) == 6


def test_what_other_images_or_settings_left_is_not_used(scene, describer, tmp_path, capsys, write_raster):
    dates = scene()
    with_change = describe_scene(dates, tmp_path / "out", describer)
    assert "started anew" not in capsys.readouterr().err
    with rasterio.open(dates[0]) as file:
        write_raster(dates[1], file.read().transpose(1, 2, 0))  # the file says something else now
    assert len(with_change.changes) == 1 and describe_scene(dates, tmp_path / "out", describer).changes == ()
    assert "what is kept there is of other images or settings; started anew." in capsys.readouterr().err


@pytest.mark.parametrize("what", ["preprocessing", "version"])
def test_what_another_processor_or_version_left_is_not_used(scene, describer, tmp_path, capsys, monkeypatch, what):
    dates = scene()
    describe_scene(dates, tmp_path / "out", describer)
    if what == "version":
        monkeypatch.setattr("kcfi.scenes.describe.version", lambda name: "0")
    else:
        monkeypatch.setattr(describer.processor.image_processor, "image_mean", (0, 0, 0))
    describe_scene(dates, tmp_path / "out", describer)
    assert "started anew" in capsys.readouterr().err


def test_not_a_number_may_be_what_is_no_data(scene, describer, tmp_path):
    dates = scene()
    named, other = (describe_scene(dates, tmp_path / "out", describer, nodata=n) for n in (float("nan"), None))
    assert named == other and json.loads(json.dumps(named.settings, allow_nan=False)) == other.settings


def test_the_commit_of_a_model_of_the_hub_is_told(scene, detector, hub_detectors, tmp_path):
    """Failed before: transformers 5.24 says it nowhere, so it was null."""
    dates, told = scene(), []
    for name, revision in (("me/detector", None), ("me/detector", "v1"), (str(detector), None)):
        describer = Describer(*load(name, revision=revision))
        found = describe_scene(dates, tmp_path / "out", describer, max_captions=0)
        told.append(json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]["revision"])
        assert told[-1] == found.settings["revision"]
    assert told == [*hub_detectors.values(), None]


def test_other_weights_have_another_digest():
    layer = torch.nn.BatchNorm1d(4).to(torch.bfloat16)
    digests = [digest(layer)]
    for change in (lambda: layer.weight[:2].copy_(torch.tensor([0.5, 1.5])), lambda: layer.running_mean.add_(1)):
        with torch.no_grad():
            change()  # the sum of the weights stays
        digests.append(digest(layer))
    assert len(set(digests)) == 3 and digests[-1] == digest(layer)


def test_a_constant_shift_is_said_and_taken_out(tmp_path, describer, write_raster, texture):
    ground = texture(300, 300)
    dates = [
        write_raster(tmp_path / "a.tif", ground[:280, :280]),
        write_raster(tmp_path / "b.tif", ground[3:283, 4:284]),
    ]
    found = describe_scene(dates, tmp_path / "out", describer)
    [shift] = found.shifts
    assert (shift.x, shift.y) == pytest.approx((-4, -3), abs=0.05) and not shift.aligned
    assert "b.tif lies 5.0 px from" in found.warnings[1] and "--align (align=True in Python)" in found.warnings[1]
    aligned = describe_scene(dates, tmp_path / "aligned", describer, align=True)
    assert aligned.shifts[0].aligned and len(aligned.warnings) == 1
    assert sum(change.pixels for change in aligned.changes) <= sum(change.pixels for change in found.changes)
    assert aligned.seen_pixels == 276 * 277


@pytest.mark.parametrize("number", range(2))
def test_an_unchanged_pair_that_is_shifted_by_one_and_a_half_pixels_raises_no_alarm(tmp_path, write_raster, number):
    from scipy import ndimage

    image = np.asarray(SyntheticDataset(8, seed=11)[2 * number]["image_before"])
    moved = ndimage.shift(image.astype(float), (0.9, 1.2, 0), order=3, mode="reflect").clip(0, 255).astype(np.uint8)
    dates = [write_raster(tmp_path / "a.tif", image), write_raster(tmp_path / "b.tif", moved)]
    found = describe_scene(dates, tmp_path / "out", Describer(*load(embedded_model())))
    assert np.hypot(found.shifts[0].x, found.shifts[0].y) == pytest.approx(1.5, abs=0.05)
    assert found.changes == () and found.warnings == ()


def test_the_file_may_say_when_it_was_acquired(scene, describer, tmp_path):
    dates = scene()
    for path, year in zip(dates, (2019, 2024), strict=True):
        with rasterio.open(path, "r+") as file:
            file.update_tags(ns="IMAGERY", ACQUISITIONDATETIME=f"{year}-05-30 10:12:13")
    found = describe_scene(dates, tmp_path / "out", describer)
    assert [(date.name, date.acquired) for date in found.dates] == [(f"{y}-05-30",) * 2 for y in (2019, 2024)]


def test_what_cannot_be_described_is_refused(scene, describer, tmp_path, make_detector):
    dates = scene()
    with pytest.raises(InputError, match="has two dates or more, the earliest first; got 1"):
        describe_scene(dates[:1], tmp_path / "out", describer)
    with pytest.raises(InputError, match="acquired names 1 dates for 2 images"):
        describe_scene(dates, tmp_path / "out", describer, acquired=["2019-06-01"])
    with pytest.raises(InputError, match=r"acquired: '1\.6\.2019' is no date in ISO 8601"):
        describe_scene(dates, tmp_path / "out", "no such model", acquired=["1.6.2019", "2024-05-30"])
    with pytest.raises(InputError, match="confirm=2: of 3 dates 0 to 1 can confirm"):
        describe_scene([*dates, dates[1]], tmp_path / "out", "no such model", confirm=2)
    for wrong in ({"model_resolution": 0}, {"max_captions": -1}):
        with pytest.raises(InputError, match="must be above 0, and max_captions="):
            describe_scene(dates, tmp_path / "out", describer, **wrong)
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"min_area={wrong:g} must be a number of m2"):
            describe_scene(dates, tmp_path / "out", "no such model", min_area=wrong)
    describer.threshold = 0.9
    with pytest.raises(InputError, match="kcfi scene has no alarm rate yet: choose by the probability"):
        describe_scene(dates, tmp_path / "out", describer)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mask.tif").write_text("mine")
    with pytest.raises(InputError, match=r"mask\.tif: the report would replace this file"):
        describe_scene(dates, tmp_path / "mine", "no such model")
    assert not (tmp_path / "mine" / WORK).exists() and (tmp_path / "mine" / "mask.tif").read_text() == "mine"
    headless = make_detector(tmp_path / "headless", use_change_detection_head=False)
    with pytest.raises(InputError, match="no change detection head"):
        describe_scene(dates, tmp_path / "out", str(headless))
