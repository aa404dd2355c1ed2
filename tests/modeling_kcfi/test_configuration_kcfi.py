"""Defaults, derived numbers, refused combinations, and the round trip through config.json."""

import pytest
from transformers import AutoConfig

from kcfi.modeling_kcfi import KCFIConfig

TOWERS = ["vit", "clip", "siglip", "dinov2", "dinov2_with_registers", "dinov3", "beit", "timm"]


def test_defaults_are_the_papers():
    config = KCFIConfig()
    assert (config.vision_config.model_type, config.text_config.model_type) == ("vit", "qwen2")
    assert (config.image_size, config.patch_size, config.num_patches) == (256, 16, 256)
    assert config.vision_feature_layers == [6, 12, 18, 24]
    assert (config.visual_inputs, config.num_image_tokens) == ("change", 1)
    assert (config.flow_residual, config.flow_scope) == ("self", "stage")
    assert (config.change_context, config.projector, config.num_change_classes) == ("none", "linear", 2)
    assert config.change_width == 4 * 1024
    assert config.tie_word_embeddings


def test_the_authors_vision_settings_can_be_spelled_out():
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": 224,
        "patch_size": 14,
    }
    config = KCFIConfig(vision_config=vision, vision_feature_layers=[4, 10, 16, 22])
    assert config.num_patches == 256
    assert config.last_block == 22


@pytest.mark.parametrize(("blocks", "layers"), [(1, [1]), (3, [1, 2, 3]), (6, [2, 3, 4, 6]), (12, [3, 6, 9, 12])])
def test_default_stages_are_evenly_spaced_up_to_the_last_block(vision, blocks, layers):
    config = KCFIConfig(vision_config=vision["vit"] | {"num_hidden_layers": blocks})
    assert config.vision_feature_layers == layers


@pytest.mark.parametrize("tower", TOWERS)
def test_every_kind_of_tower_tells_its_geometry(make_config, tower):
    config = make_config(tower)
    assert config.tower[:4] == (32, 4, 3, 16)
    assert (config.num_patches, config.num_stages, config.stage_width) == (16, 2, 64)


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_removed_from_the_tower_and_not_from_the_callers_config(vision, text, name):
    own = AutoConfig.for_model(**(vision["vit"] | {name: 0.3}))
    config = KCFIConfig(vision_config=own, text_config=text["qwen2"], image_token_id=4, vision_feature_layers=[2])
    assert getattr(config.vision_config, name) == 0
    assert getattr(own, name) == 0.3


@pytest.mark.parametrize(("context", "width"), [("none", 64), ("after", 128), ("bitemporal", 192)])
def test_change_context_widens_the_change_features(make_config, context, width):
    assert make_config(change_context=context).change_width == width


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 250}, r"image_size=250 .* patch size 4; the nearest is 248"),
        ({"image_size": 2}, r"image_size=2 .* nearest is 4"),
        ({"visual_token_pooling": 3}, r"visual_token_pooling=3 does not divide the 4 x 4 patches of an image"),
        ({"visual_token_pooling": 0}, r"visual_token_pooling=0 does not divide"),
        ({"vision_feature_layers": []}, r"vision_feature_layers=\[\] .* between 1 and 3"),
        ({"vision_feature_layers": [0, 3]}, r"\[0, 3\] must be ascending block numbers between 1 and 3"),
        ({"vision_feature_layers": [1, 4]}, r"\[1, 4\] must be ascending block numbers between 1 and 3"),
        ({"vision_feature_layers": [3, 1]}, r"\[3, 1\] must be ascending"),
        ({"image_token_id": 99}, r"image_token_id=99 .* vocabulary of 99 tokens"),
        ({"change_context": "after", "visual_inputs": "bitemporal_change"}, r"one projector also serves the plain"),
        (
            {"visual_inputs": "bitemporal", "use_change_detection_head": False},
            r"Nothing reads the key change features",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(make_config, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(**settings)


@pytest.mark.parametrize(
    "settings", [{"flow_residual": "none"}, {"num_change_classes": 4}, {"projector": "mlp"}, {"visual_inputs": "both"}]
)
def test_an_unknown_choice_is_refused_by_field(make_config, settings):
    with pytest.raises(Exception, match=next(iter(settings))):
        make_config(**settings)


def test_towers_that_are_no_vit_are_refused(vision):
    with pytest.raises(ValueError, match="'resnet' is not a ViT"):
        KCFIConfig(vision_config={"model_type": "resnet"})
    with pytest.raises(ValueError, match="square images and patches"):
        KCFIConfig(vision_config=vision["vit"] | {"image_size": [16, 32]})
    with pytest.raises(ValueError, match="'resnet18' is not a ViT"):
        KCFIConfig(vision_config={"model_type": "timm_wrapper", "architecture": "resnet18"})


SIZE = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("siglip2_vision_model", "missing 2 required positional arguments: 'pixel_attention_mask'"),  # NaFlex
        ("vit_mae", r"states of shape \(2, 5, 32\)"),  # drops three quarters of the patches
        ("sam_vision_model", r"states of shape \(2, 4, 4, 32\)"),
        ("pixtral", r"states of shape \(1, 32, 32\)"),  # one long row of all images
        ("videomae", "not enough values to unpack"),
        ("glm4v_vision", "missing 1 required positional argument: 'grid_thw'"),
    ],
)
def test_a_tower_that_has_the_fields_of_a_vit_and_is_none_is_refused(model_type, reason):
    with pytest.raises(ValueError, match=rf"'{model_type}' cannot be the vision tower.*{reason}"):
        KCFIConfig(vision_config={"model_type": model_type, **SIZE})


@pytest.mark.parametrize("model_type", ["deit", "data2vec-vision", "vit_msn", "ijepa", "idefics3_vision", "mlcd"])
def test_other_plain_vits_are_taken(model_type):
    assert KCFIConfig(vision_config={"model_type": model_type, **SIZE}).num_patches == 16


def test_a_tower_that_reads_one_size_only_is_refused_at_another(vision):
    one_size = {"model_type": "aimv2_vision_model", **SIZE}
    assert KCFIConfig(vision_config=one_size).image_size == 16
    with pytest.raises(ValueError, match=r"cannot be the vision tower.*32 x 32 px"):
        KCFIConfig(vision_config=one_size, image_size=32)


@pytest.mark.parametrize("tower", TOWERS)
def test_config_survives_a_round_trip(make_config, tower, tmp_path):
    config = make_config(tower, change_context="after", flow_residual="cross", image_size=24, num_change_classes=3)
    config.save_pretrained(tmp_path)
    assert KCFIConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_file_that_a_pipeline_wrote_is_read(make_config):
    settings = make_config().to_dict()
    assert KCFIConfig.from_dict({**settings, "custom_pipelines": {"change-captioning": {}}}).to_dict() == settings


@pytest.mark.parametrize("tie", [True, False])
def test_tied_embeddings_follow_the_language_model(vision, text, tie):
    language = text["qwen2"] | {"tie_word_embeddings": tie}
    assert KCFIConfig(vision_config=vision["vit"], text_config=language, image_token_id=4).tie_word_embeddings is tie


def test_a_timm_tower_of_another_size_is_told_so_where_it_must_be():
    size = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 4}
    for architecture, told in (("vit_tiny_patch16_224", {"dynamic_img_size": True}), ("xcit_nano_12_p16_224", {})):
        tower = {"model_type": "timm_wrapper", "architecture": architecture, "model_args": size}
        assert KCFIConfig(vision_config=tower, image_size=64).vision_config.model_args == {**size, **told}
        assert KCFIConfig(vision_config=tower, image_size=32).vision_config.model_args == size


def test_a_timm_tower_loses_its_dropout_and_drop_path():
    args = {"img_size": 64, "depth": 4, "drop_path_rate": 0.3, "proj_drop_rate": 0.1}
    tower = {"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224", "model_args": args}
    assert KCFIConfig(vision_config=tower).vision_config.model_args == {"img_size": 64, "depth": 4}
