import numpy as np
import pytest
from scipy import ndimage

from kcfi.training.synthetic.material_library import LibraryMaterials, mosaic


def test_surfaces_come_from_the_library_and_the_rest_is_procedural(library):
    materials = LibraryMaterials(library)
    texture = np.asarray(materials.texture("grass", 128, np.random.default_rng(0)))
    assert texture.shape == (128, 128, 3)
    assert (texture == (30, 160, 40)).all()
    water = materials.texture("water", 128, np.random.default_rng(0))
    assert water.size == (128, 128) and np.asarray(water).std((0, 1)).min() > 1  # noise


def test_a_split_never_reads_the_materials_of_another(library):
    seen = {split: {entry.file for entry in LibraryMaterials(library, split).entries} for split in ("train", "test")}
    assert seen["train"] and seen["test"] and not seen["train"] & seen["test"]


def test_mosaics_cover_everything_without_seams_in_a_flat_colour():
    pieces = [np.full((60, 70, 3), 100, np.float32), np.full((50, 50, 3), 100, np.float32)]
    assert mosaic(pieces, 200, np.random.default_rng(0)) == pytest.approx(np.full((200, 200, 3), 100))


def test_labels_of_a_mosaic_are_never_mixed_and_lie_on_their_pixels():
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((4, 60, 60, 1)) < 0.5, np.float32(255), np.float32(0))
    pieces = list(labels)
    sharp = mosaic(pieces, 150, np.random.default_rng(3), seam=64).round()
    blended = mosaic(pieces, 150, np.random.default_rng(3))
    assert set(np.unique(sharp)) == {0, 64, 255}
    assert 0.02 < (sharp == 64).mean() < 0.15
    certain = (sharp != 64) & ((blended < 1) | (blended > 254))
    assert certain.mean() > 0.5
    assert (abs(sharp - blended)[certain] < 1).all()


def test_tiles_smaller_than_asked_for_become_a_mosaic_with_labels(library):
    image, labels = LibraryMaterials(library).tile(True, 264, np.random.default_rng(1))
    assert image.size == (264, 264) and labels.shape == (264, 264)
    red = np.asarray(image)[..., 0] > 150  # the roofs of the labelled tile
    inside = ndimage.binary_erosion(labels == 255)
    assert inside.any() and red[inside].all()
    assert not red[ndimage.binary_dilation(labels != 0, iterations=7) == 0].any()


def test_a_missing_library_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"materials.json does not exist: .*kcfi data materials"):
        LibraryMaterials(tmp_path)


def test_a_split_without_materials_is_refused(library):
    with pytest.raises(ValueError, match="no material of split 'val', but test, train"):
        LibraryMaterials(library, "val")


def test_a_library_that_cannot_be_read_is_named(library, tmp_path):
    (tmp_path / "materials.json").write_text("{")
    with pytest.raises(ValueError, match=r"materials\.json"):
        LibraryMaterials(tmp_path)
