"""The small vision tower: its labels are what stands in the picture, and a trial of the pretraining command."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, TimmWrapperConfig, TimmWrapperModel

from kcfi.processing import KCFIImageProcessor
from kcfi.towers import join_towers
from kcfi.training.arguments import parse_recipe
from kcfi.training.sharing.model_card import license_of
from kcfi.training.synthetic.dataset import SyntheticDataset
from kcfi.training.towers.vision_tower import CLASSES, LAYERS, Dates, Namer, main, objects


def test_objects_of_the_after_date_cover_what_appeared_in_the_mask():
    scenes = SyntheticDataset(60, seed=5)
    for index in range(1, 60, 2):
        _, scene = scenes.paint_after(index)
        if scene.change.appears:
            built = objects(scene)
            for value, names in ((255, (2, 3)), (128, (1,))):
                pixels = scene.mask == value
                # a pixel has one name, and edges are drawn twice: not all agree
                assert not pixels.any() or np.isin(built[pixels], names).mean() > 0.95
            named = {change.kind for change in scene.change.objects}
            assert named <= {CLASSES[value] for value in np.unique(built)}


def test_turned_images_keep_their_labels():
    dates = Dates(SyntheticDataset(4, seed=5), KCFIImageProcessor())
    torch.manual_seed(0)
    first = [dates[1] for _ in range(8)]
    # whatever the turn, the same pixels have the same label: mean colour per class does not change
    means = [
        torch.stack([sample["pixel_values"][:, sample["labels"] == name].mean(1) for name in (0, 1)])
        for sample in first
    ]
    for mean in means[1:]:
        torch.testing.assert_close(mean, means[0], rtol=1e-4, atol=1e-4)
    assert len({sample["labels"].numpy().tobytes() for sample in first}) > 1


def test_namer_reads_the_blocks_that_kcfi_compares():
    size = {"img_size": 64, "embed_dim": 16, "depth": LAYERS[-1] + 1, "num_heads": 2, "cls_attn_layers": 0}
    namer = Namer(TimmWrapperModel(TimmWrapperConfig(architecture="xcit_nano_12_p8_224", model_args=size)))
    images = torch.randn(2, 3, 64, 64)
    namer(images, torch.randint(0, 4, (2, 64, 64)))["loss"].backward()
    assert all(block.mlp.fc1.weight.grad.abs().sum() > 0 for block in namer.tower.timm_model.blocks)

    recipe = parse_recipe("tiny").model
    assert [layer + 1 for layer in LAYERS] == recipe.model_settings["vision_feature_layers"]


def test_a_tower_beside_an_image_processor_of_kcfi_is_joined_with_its_normalisation(tmp_path, text_model):
    size = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2, "cls_attn_layers": 0}
    TimmWrapperModel(TimmWrapperConfig(architecture="xcit_nano_12_p8_224", model_args=size)).save_pretrained(tmp_path)
    KCFIImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    _, processor = join_towers(str(tmp_path), str(text_model), vision_feature_layers=[1, 2])
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["0", "1"])
def test_pretraining_command_writes_a_tower_that_loads(tmp_path, steps):
    main(["--output", str(tmp_path), "--steps", steps])
    assert len(AutoModel.from_pretrained(tmp_path).timm_model.blocks) == LAYERS[-1] + 1
    assert license_of(str(tmp_path)) == "apache-2.0"
