import gzip
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from kcfi.training.collator import IGNORED, KCFICollator
from kcfi.training.data.augmentation import augment, flip, flip_caption, jitter
from kcfi.training.synthetic.dataset import SyntheticDataset
from tests.training.synthetic.test_dataset import CAPTIONS, clauses, named_objects, position_fits

AXES = ("horizontal", "vertical")


def plain(example):
    """An example with arrays instead of images."""
    return {
        key: np.asarray(value).tolist() if isinstance(value, Image.Image) else value for key, value in example.items()
    }


@pytest.mark.parametrize(
    ("caption", "horizontal", "vertical"),
    [
        (
            "a villa at the top left corner .",
            "a villa at the top right corner .",
            "a villa at the bottom left corner .",
        ),
        ("in the lower-right-hand corner", "in the lower-left-hand corner", "in the upper-right-hand corner"),
        ("roads from right to left", "roads from left to right", "roads from right to left"),
        ("a road above the house", "a road above the house", "a road below the house"),
        ("Right of it, the topmost house", "Left of it, the topmost house", "Right of it, the bottommost house"),
        ("the right half and a right angle", "the left half and a right angle", "the right half and a right angle"),
        ("bright roofs and a rooftop pool", "bright roofs and a rooftop pool", "bright roofs and a rooftop pool"),
        ("a vertical road in the center", "a vertical road in the center", "a vertical road in the center"),
        ("the cars have left", None, "the cars have left"),
        ("a little forest is left", None, "a little forest is left"),
        ("a house right beside the road", None, "a house right beside the road"),
        ("houses in the left space", None, "houses in the left space"),
        ("a road under the viaducts", "a road under the viaducts", None),
        ("in the higher left area", "in the higher right area", None),
        ("in the north of the city", None, None),
        ("southeastern houses", None, None),
    ],
)
def test_words_of_direction_are_exchanged_where_that_is_safe(caption, horizontal, vertical):
    assert flip_caption(caption, "horizontal") == horizontal
    assert flip_caption(caption, "vertical") == vertical


@pytest.mark.parametrize("axis", AXES)
def test_flipping_real_captions_twice_is_the_identity(axis):
    if not CAPTIONS.exists():
        pytest.skip(f"{CAPTIONS.name} is not at hand")
    with gzip.open(CAPTIONS, "rt", encoding="utf-8") as file:
        pairs = [[sentence["raw"] for sentence in entry["sentences"]] for entry in json.load(file)["images"]]
    refused = 0
    for captions in pairs:
        flipped = [flip_caption(caption, axis) for caption in captions]
        refused += None in flipped
        for caption, other in zip(captions, flipped, strict=True):
            assert other is None or flip_caption(other, axis) == caption
    assert 0 < refused < 0.005 * len(pairs)


@pytest.mark.parametrize("axis", AXES)
def test_flipping_twice_is_the_identity_on_images_mask_and_words(axis):
    dataset = SyntheticDataset(4)
    for example in (dataset[1], dataset[2] | {"mask": None}):
        once = flip(example, axis)
        assert plain(once) != plain(example)
        assert plain(flip(once, axis)) == plain(example)


def test_an_example_with_a_caption_that_cannot_be_mirrored_stays(make_pairs):
    example = make_pairs()[1]
    example["captions"] = [*example["captions"], "some cars have left ."]
    assert flip(example, "horizontal") is example
    assert flip(example, "vertical")["captions"] == example["captions"]


@pytest.mark.parametrize("axis", AXES)
def test_mirrored_captions_are_true_to_the_mirrored_mask(axis):
    dataset = SyntheticDataset(161)
    changed = 0
    for index in range(1, 161, 2):
        mask, _, captions = dataset.truth(index)
        mask = mask[:, ::-1] if axis == "horizontal" else mask[::-1]
        mirrored = [flip_caption(caption, axis) for caption in captions]
        changed += mirrored != captions
        for caption in mirrored:
            for clause in clauses(caption):
                values = [128 if kinds == {"road"} else 255 for _, kinds in named_objects(clause)]
                assert not values or position_fits(clause, np.isin(mask, values)), (index, caption)
    assert changed > 20


def test_light_and_colour_of_each_date_are_drawn_on_their_own():
    image = SyntheticDataset(2)[0]["image_before"]
    example = {"image_before": image, "image_after": image, "mask": None, "captions": ["there is no difference ."]}
    augmented = augment(example, random.Random(1))
    dates = [np.asarray(augmented[key], np.float32) for key in ("image_before", "image_after")]
    assert np.abs(dates[0] - dates[1]).mean() > 2
    assert augmented["image_before"].tobytes() == augment(example, random.Random(1))["image_before"].tobytes()
    assert jitter(image, random.Random(1)).size == image.size and example["image_before"] is image


def test_what_the_collator_draws_depends_on_seed_epoch_and_name_alone(processor, make_pairs):
    pairs = [make_pairs()[index] for index in range(6)]
    collator, again = (KCFICollator(processor, augment=True) for _ in range(2))
    first = collator(pairs)
    alone = again(pairs[2:3])
    assert torch.equal(first["pixel_values"][2:3], alone["pixel_values"])
    collator.set_epoch(1)
    assert not torch.equal(first["pixel_values"], collator(pairs)["pixel_values"])
    for unaugmented in (KCFICollator(processor), KCFICollator(processor, augment=True).for_evaluation()):
        expected = processor.image_processor(
            [[p["image_before"], p["image_after"]] for p in pairs], return_tensors="pt"
        )
        assert torch.equal(unaugmented(pairs)["pixel_values"], expected["pixel_values"])


def test_pixels_mask_and_caption_of_a_batch_agree(processor, make_pairs):
    """In a changed pair a bright square appears, in the half that the caption names."""
    pairs = [make_pairs()[index] for index in (1, 3, 5, 7)]
    collator = KCFICollator(processor, augment=True)
    sides = set()
    for epoch in range(4):
        collator.set_epoch(epoch)
        batch = collator(pairs)
        for number in range(len(pairs)):
            mask = batch["mask_labels"][number] == 1
            before, after = batch["pixel_values"][number].mean(dim=1)
            assert (after - before)[mask].min() > (after - before)[~mask].max()
            labels = batch["labels"][number]
            caption = processor.tokenizer.decode(labels[labels != IGNORED])
            side = "left" if mask[:, :16].sum() > mask[:, 16:].sum() else "right"
            assert side in caption
            sides.add((number, side))
    assert len(sides) > len(pairs)  # some pairs were seen both ways
