import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from kcfi.processing import KCFIImageProcessor, KCFIImageProcessorPil

BACKENDS = [KCFIImageProcessor, KCFIImageProcessorPil]
UNNORMALISED = {"do_normalize": False, "do_resize": False}


def pixels(processor, image, **settings):
    """Values 0 to 255 (C, H, W) that the processor reads from one image."""
    values = processor(image, return_tensors="pt", **UNNORMALISED, **settings)["pixel_values"][0] * 255
    return values.round().to(torch.uint8).numpy()


def one_hot_logits(labels, num_classes):
    """Logits (B, classes, H, W) that are sure of `labels` (B, H, W)."""
    return 10.0 * torch.nn.functional.one_hot(labels, num_classes).permute(0, 3, 1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
class TestStructure:
    def test_a_list_of_pairs_gives_one_row_per_pair(self, backend, make_image):
        pairs = [[make_image(0), make_image(1)], [make_image(2, 60, 30), make_image(3, 60, 30)]]
        masks = [np.zeros((40, 50), np.uint8), np.zeros((60, 30), np.uint8)]
        inputs = backend()(pairs, segmentation_maps=masks, return_tensors="pt")
        assert inputs["pixel_values"].shape == (2, 2, 3, 256, 256)
        assert inputs["pixel_values"].dtype == torch.float32
        assert inputs["mask_labels"].shape == (2, 256, 256)
        assert inputs["mask_labels"].dtype == torch.int64

    def test_before_and_after_keep_their_places(self, backend, pair):
        paired = backend()([pair, pair[::-1]], return_tensors="pt")["pixel_values"]
        flat = backend()(pair, return_tensors="pt")["pixel_values"]
        assert flat.shape == (2, 3, 256, 256)
        assert torch.equal(paired[0], flat)
        assert torch.equal(paired[1], flat.flip(0))

    def test_stacked_arrays_equal_lists_of_images(self, backend, pair):
        expected = backend()([pair, pair], return_tensors="pt")["pixel_values"]
        array = np.stack([np.stack([np.asarray(image) for image in pair])] * 2)
        tensor = torch.from_numpy(array).permute(0, 1, 4, 2, 3)
        for images in (array, list(array), tensor, list(tensor)):
            assert torch.equal(backend()(images, return_tensors="pt")["pixel_values"], expected)

    def test_paths_equal_opened_images(self, backend, pair, tmp_path):
        files = [tmp_path / "before.png", tmp_path / "after.png"]
        for image, file in zip(pair, files, strict=True):
            image.save(file)
        expected = backend()([pair], return_tensors="pt")["pixel_values"]
        for names in (files, [str(file) for file in files]):
            assert torch.equal(backend()([names], return_tensors="pt")["pixel_values"], expected)

    def test_grey_arrays_need_no_channel_axis(self, backend, pair):
        grey = [np.array(image.convert("L")) for image in pair]
        inputs = backend()([grey], return_tensors="pt")["pixel_values"]
        assert torch.equal(inputs, backend()([[a[..., None] for a in grey]], return_tensors="pt")["pixel_values"])

    def test_groups_of_other_than_two_are_refused(self, backend, pair):
        for images in ([[pair[0]]], [pair, pair[0]], [[*pair, pair[0]]], []):
            with pytest.raises(ValueError, match=r"\[before, after\] pairs of two images"):
                backend()(images)
        with pytest.raises(TypeError, match="NoneType is not an image"):
            backend()([[pair[0], None]])


@pytest.mark.parametrize("backend", BACKENDS)
class TestValues:
    def test_pixels_are_scaled_and_normalised(self, backend):
        image = np.full((30, 30, 3), (0, 100, 255), np.uint8)
        values = backend(size=16, image_mean=[0.5, 0.25, 0.5], image_std=[0.5, 0.5, 0.25])(image, return_tensors="pt")
        expected = torch.tensor([-1.0, (100 / 255 - 0.25) / 0.5, 2.0]).reshape(3, 1, 1).expand(3, 16, 16)
        torch.testing.assert_close(values["pixel_values"][0], expected)

    @pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
    def test_modes_are_read_in_rgb(self, backend, mode, make_image):
        image = make_image(0).convert(mode)
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(pixels(backend(), image), expected)

    @pytest.mark.parametrize("mode", ["LA", "PA", "RGBA"])
    def test_transparency_shows_white(self, backend, mode):
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
        image.putpixel((1, 0), (0, 0, 0, 0))
        assert pixels(backend(), image.convert(mode))[:, 0].tolist() == [[0, 255]] * 3

    def test_floats_bools_and_wide_integers_are_read_as_8_bits(self, backend, make_image):
        expected = np.array(make_image(0)).transpose(2, 0, 1)
        for image in (
            (expected / 255).astype(np.float32),
            torch.from_numpy(expected).double() / 255,
            expected.astype(np.int64),
            torch.from_numpy(expected).int(),
        ):
            assert np.array_equal(pixels(backend(), image), expected)
        assert np.array_equal(pixels(backend(), expected > 128), np.where(expected > 128, 255, 0))
        grey = Image.fromarray((expected[0] / 255).astype(np.float32))
        assert np.array_equal(pixels(backend(), grey)[0], expected[0])

    @pytest.mark.parametrize(
        ("values", "kind"),
        [
            (np.full((4, 4, 3), 3000, np.uint16), "dtype uint16"),
            (np.full((4, 4, 3), 200, np.uint16), "dtype uint16"),
            (torch.full((3, 4, 4), 256), "dtype torch.int64"),
            (np.full((4, 4, 3), -1), "dtype int64"),
            (np.full((4, 4, 3), 128.0), "dtype float64"),
            (np.full((4, 4, 3), np.nan, np.float32), "dtype float32"),
            (Image.fromarray(np.full((4, 4), 3000, np.uint16)), "mode 'I;16'"),
            (Image.fromarray(np.full((4, 4), 70000, np.int32)), "mode 'I'"),
            (Image.fromarray(np.full((4, 4), 128, np.float32)), "mode 'F'"),
            (Image.new("LAB", (4, 4)), "mode 'LAB'"),
        ],
    )
    def test_unclear_values_are_refused_by_name(self, backend, values, kind):
        with pytest.raises(
            ValueError, match=f"of {kind} with values .* is not understood: give RGB or grey of 8 bits"
        ):
            backend()(values)

    def test_a_16_bit_file_is_named(self, backend, tmp_path):
        Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(tmp_path / "deep.png")
        with pytest.raises(ValueError, match=r"An image \(.*deep\.png\) of mode 'I;16'"):
            backend()([[tmp_path / "deep.png"] * 2])

    @pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
    def test_exif_rotation_is_applied_to_images_and_masks(self, backend, suffix, tmp_path, make_image):
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise
        image = make_image(0)
        image.save(tmp_path / f"turned.{suffix}", exif=exif)
        image.save(tmp_path / f"plain.{suffix}")
        upright = Image.open(tmp_path / f"plain.{suffix}").rotate(-90, expand=True)
        turned = tmp_path / f"turned.{suffix}"
        mask = Image.new("L", image.size)
        mask.paste(1, (0, 0, 10, 10))
        mask.save(tmp_path / "mask.png", exif=exif)
        inputs = backend()(
            [[turned, turned]], segmentation_maps=[tmp_path / "mask.png"], return_tensors="pt", **UNNORMALISED
        )
        assert inputs["pixel_values"].shape == (1, 2, 3, 50, 40)
        assert np.array_equal(pixels(backend(), turned), np.asarray(upright).transpose(2, 0, 1))
        assert np.array_equal(inputs["mask_labels"][0], np.asarray(mask.rotate(-90, expand=True)))


class TestBrokenInput:
    def test_a_truncated_file_is_named(self, tmp_path, make_image):
        make_image(0).save(tmp_path / "whole.png")
        (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:600])
        with pytest.raises(ValueError, match=r"half\.png: cannot be read as an image"):
            KCFIImageProcessor()(tmp_path / "half.png")
        with (
            Image.open(tmp_path / "half.png") as opened,
            pytest.raises(ValueError, match=r"half\.png: cannot be read"),
        ):
            KCFIImageProcessor()(opened)

    def test_what_is_not_an_image_is_named(self, tmp_path):
        (tmp_path / "empty.png").touch()
        with pytest.raises(ValueError, match=r"empty\.png: cannot be read as an image"):
            KCFIImageProcessor()(tmp_path / "empty.png")
        with pytest.raises(FileNotFoundError, match=r"missing\.png"):
            KCFIImageProcessor()(tmp_path / "missing.png")

    def test_a_pair_of_different_sizes_names_both(self, tmp_path, make_image):
        make_image(0, 40, 50).save(tmp_path / "old.png")
        make_image(0, 40, 51).save(tmp_path / "new.png")
        with pytest.raises(ValueError, match=r"before \(.*old\.png\): 50 x 40 px, after \(.*new\.png\): 51 x 40 px"):
            KCFIImageProcessor()([[tmp_path / "old.png", tmp_path / "new.png"]])
        with pytest.raises(ValueError, match="before: 50 x 40 px, after: 51 x 40 px"):
            KCFIImageProcessor()([[np.zeros((40, 50, 3), np.uint8), np.zeros((40, 51, 3), np.uint8)]])

    def test_a_mask_of_another_size_is_refused(self, pair):
        with pytest.raises(ValueError, match="image: 50 x 40 px, mask: 40 x 50 px"):
            KCFIImageProcessor()([pair], segmentation_maps=[np.zeros((50, 40), np.uint8)])

    def test_a_missing_mask_is_refused(self, pair):
        with pytest.raises(ValueError, match="1 masks for 2 images or pairs"):
            KCFIImageProcessor()([pair, pair], segmentation_maps=[np.zeros((40, 50), np.uint8)])

    def test_what_has_no_class_ids_is_refused(self, pair):
        with pytest.raises(ValueError, match="mask of mode 'RGB' has no class ids"):
            KCFIImageProcessor()([pair], segmentation_maps=[pair[0]])
        for mask in (np.zeros((40, 50), np.float32), np.full((40, 50), -1), np.zeros((40, 50, 3), np.uint8)):
            with pytest.raises(ValueError, match=f"dtype {mask.dtype} and values .* has no class ids"):
                KCFIImageProcessor()([pair], segmentation_maps=[mask])

    def test_a_crop_larger_than_the_image_is_refused(self, pair):
        processor = KCFIImageProcessor(size=200, do_center_crop=True, crop_size=224)
        with pytest.raises(ValueError, match="crop_size 224 x 224 is larger than the resized image, 200 x 200 px"):
            processor([pair])


RELEASED = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}
GEOMETRIES = [{}, {"size": {"height": 96, "width": 160}}, RELEASED]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", GEOMETRIES, ids=["square", "rectangle", "released"])
class TestMasks:
    def test_a_mask_goes_through_the_geometry_of_the_image(self, backend, settings):
        mask = np.zeros((300, 400), np.uint8)
        mask[70:210, 90:230] = 1
        image = mask * 255
        inputs = backend(do_normalize=False, **settings)(
            [[image, image]], segmentation_maps=[mask], return_tensors="pt"
        )
        shown = (inputs["pixel_values"][0, 1, 0] > 0.5).long()
        assert (shown != inputs["mask_labels"][0]).float().mean() < 0.002

    def test_classes_are_not_blended_and_no_label_survives(self, backend, settings, make_image):
        mask = np.random.default_rng(0).choice(np.array([0, 2, 255], np.uint8), (300, 400))
        pair = [make_image(0, 300, 400)] * 2
        masks = [mask, Image.fromarray(mask), torch.from_numpy(mask).long(), mask[None], None]
        labels = backend(**settings)([pair] * 5, segmentation_maps=masks, return_tensors="pt")["mask_labels"]
        assert labels[0].unique().tolist() == [0, 2, 255]
        assert all(torch.equal(labels[0], other) for other in labels[1:4])
        assert (labels[4] == 255).all()

    def test_masks_come_back_at_the_size_of_the_input(self, backend, settings):
        mask = np.zeros((300, 400), np.uint8)
        mask[100:200, 150:260], mask[220:250, 120:180] = 1, 2
        processor = backend(**settings)
        pair = [np.zeros((300, 400, 3), np.uint8)] * 2
        labels = processor([pair], segmentation_maps=[mask], return_tensors="pt")["mask_labels"]
        (found,) = processor.post_process_masks(one_hot_logits(labels, 3), [(300, 400)])
        assert found.dtype == torch.uint8 and found.shape == (300, 400)
        seen = found != 255
        assert (found.numpy() != mask)[seen].mean() < 0.005
        assert seen.all() == ("do_center_crop" not in settings)


class TestPostProcessMasks:
    def test_the_border_outside_the_crop_is_marked_as_not_seen(self):
        processor = KCFIImageProcessor(**RELEASED)
        (found,) = processor.post_process_masks(
            one_hot_logits(torch.ones(1, 224, 224, dtype=torch.long), 2), [(256, 256)]
        )
        assert (found[16:240, 16:240] == 1).all()
        assert (found == 255).sum() == 256 * 256 - 224 * 224

    def test_the_border_scales_with_a_larger_input(self):
        processor = KCFIImageProcessor(**RELEASED)
        (found,) = processor.post_process_masks(torch.zeros(1, 2, 224, 224), [(512, 1024)])
        assert (found[32:480, 288:736] == 0).all()
        assert (found != 255).sum() == 448 * 448

    def test_every_map_gets_its_own_size(self):
        sizes = torch.tensor([[30, 40], [100, 50]])
        maps = KCFIImageProcessor().post_process_masks(torch.zeros(2, 3, 64, 64, dtype=torch.bfloat16), sizes)
        assert [tuple(found.shape) for found in maps] == [(30, 40), (100, 50)]

    def test_another_number_of_sizes_is_refused(self):
        with pytest.raises(ValueError, match="1 target_sizes for 2 mask logits"):
            KCFIImageProcessor().post_process_masks(torch.zeros(2, 2, 8, 8), [(8, 8)])


def test_both_backends_give_the_same_pixels(pair):
    torchvision, pil = (backend(**RELEASED)([pair], return_tensors="pt")["pixel_values"] for backend in BACKENDS)
    torch.testing.assert_close(torchvision, pil, atol=0.05, rtol=0)  # 0.02 is one step of 8 bits


@pytest.mark.parametrize("backend", BACKENDS)
def test_settings_survive_saving(backend, pair, tmp_path):
    processor = backend(size=32, image_mean=[0.1, 0.2, 0.3], do_center_crop=True, crop_size=16)
    processor.save_pretrained(tmp_path)
    reloaded = AutoImageProcessor.from_pretrained(tmp_path, backend=processor.backend)
    assert type(reloaded) is backend
    assert reloaded.to_dict() == processor.to_dict()
    expected = processor([pair], return_tensors="pt")["pixel_values"]
    assert torch.equal(reloaded([pair], return_tensors="pt")["pixel_values"], expected)


@pytest.mark.slow
def test_the_pil_backend_works_without_torchvision(tmp_path):
    KCFIImageProcessor(size=16).save_pretrained(tmp_path)
    code = """
import sys
sys.modules["torchvision"] = None  # importing it now fails
import kcfi, numpy
from transformers import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
inputs = processor([numpy.zeros((2, 20, 20, 3), numpy.uint8)], return_tensors="pt")
print(type(processor).__name__, tuple(inputs["pixel_values"].shape))
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "KCFIImageProcessorPil (1, 2, 3, 16, 16)"
