"""The packaged recipes: every one parses, and its model can be built (on the meta device, so without memory)."""

import dataclasses

import pytest
import torch
from transformers import Trainer

from kcfi import KCFIConfig, KCFIForConditionalGeneration, embedded_model
from kcfi.training.ablation_table import read_set
from kcfi.training.arguments import packaged_recipes, parse_recipe
from kcfi.training.data.pairs import num_classes
from kcfi.training.parameters import freeze, parameter_groups

NAMES = list(packaged_recipes())

# What makes the row of an ablation differ from the row that its set is built around, and nothing else does.
BASELINE = {
    "dwa": "none",
    "use_change_detection_head": False,
    "use_key_change_perceiver": False,
    "visual_inputs": "bitemporal",
}
ABLATIONS = {
    "paper": {
        "ablations/frozen": {"train_vision_tower": False},
        "ablations/baseline": BASELINE,
        "ablations/cfe": {"dwa": "none", "use_change_detection_head": False},
        "ablations/cdh": {"dwa": "none"},
        "ablations/two_image_tokens": {"visual_inputs": "bitemporal"},
        "ablations/three_image_tokens": {"visual_inputs": "bitemporal_change"},
        "ablations/dwa_step_t2": {"dwa_temperature": 2.0},
        "ablations/dwa_epoch": {"dwa": "epoch"},
        "ablations/dwa_epoch_t2": {"dwa": "epoch", "dwa_temperature": 2.0},
    },
    "synthetic/kcfi": {
        "synthetic/baseline": BASELINE,
        "synthetic/cfe": {"dwa": "none", "use_change_detection_head": False},
        "synthetic/cdh": {"dwa": "none"},
        "synthetic/two_image_tokens": {"visual_inputs": "bitemporal"},
        "synthetic/three_image_tokens": {"visual_inputs": "bitemporal_change"},
        "synthetic/self_residual": {"flow_residual": "self"},
        "synthetic/global_flow": {"flow_scope": "stage_and_global"},
        "synthetic/context_after": {"change_context": "after"},
        "synthetic/context_bitemporal": {"change_context": "bitemporal"},
        "synthetic/mlp_projector": {"projector": "mlp2x_gelu"},
        "synthetic/every_patch": {"visual_token_pooling": 1},
        "synthetic/dwa_step_t2": {"dwa_temperature": 2.0},
        "synthetic/dwa_window_t2": {"dwa": "window", "dwa_window": 10, "dwa_temperature": 2.0},
        "synthetic/dwa_epoch": {"dwa": "epoch"},
        "synthetic/dwa_epoch_t2": {"dwa": "epoch", "dwa_temperature": 2.0},
        "synthetic/frozen_128px": {"image_size": 128},
        "synthetic/fine_tuned_128px": {"image_size": 128, "train_vision_tower": True, "feature_cache": None},
    },
}
ONLY_DRAWN = ("global_flow", "mlp_projector", "every_patch", "dwa_window_t2", "dwa_epoch", "dwa_epoch_t2")
ABLATIONS["real/kcfi"] = {
    name.replace("synthetic/", "real/"): difference
    for name, difference in ABLATIONS["synthetic/kcfi"].items()
    if name.removeprefix("synthetic/") not in ONLY_DRAWN
}
RATES = ("learning_rate", "vision_learning_rate", "projector_learning_rate")
FROM_NOTHING = {
    "model": None,
    "vision_model": "runs/blank-vit",
    "text_model": "runs/blank-lm",
    "vision_feature_layers": [2, 4, 6, 8],
    "visual_token_pooling": 2,
    "flow_residual": "cross",
    "change_context": "bitemporal",
    "num_change_classes": 3,
    **dict.fromkeys(RATES, 1e-3),
}
ABLATIONS["levir_few/pairs_608"] = {
    "levir_few/pairs_152": {"num_train_pairs": 152},
    "levir_few/pairs_38": {"num_train_pairs": 38},
    "levir_few/pairs_0": {
        "max_steps": -1,
        "num_train_epochs": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
    },
    "levir_few/scratch_608": FROM_NOTHING,
    "levir_few/scratch_152": {**FROM_NOTHING, "num_train_pairs": 152},
    "levir_few/scratch_38": {**FROM_NOTHING, "num_train_pairs": 38},
    "levir_few/mixed_608": {
        "dataset": "runs/mixed",
        "crops_per_scene": None,
        "num_train_pairs": None,
        "max_steps": 624,
    },
    "levir_few/rate_1e-4": dict.fromkeys(RATES, 1e-4),
    "levir_few/rate_1e-3": dict.fromkeys(RATES, 1e-3),
    "levir_few/frozen_language_model": {"train_language_model": False},
    "levir_few/frozen_vision_tower": {"train_vision_tower": False, "feature_cache": "runs/features"},
    "levir_few/augmented": {"augment": True},
    "levir_few/averaged": {"ema_decay": 0.99},
    "levir_few/scst_608": {
        "model": "runs/levir_few/pairs_608-0",
        "objective": "scst",
        "metric_for_best_model": "s_m",
        "max_steps": 152,
        "eval_steps": 38,
        "save_steps": 38,
        **dict.fromkeys(RATES, 2e-5),
    },
}

# What stands behind the names of towers in the recipes, so that nothing is downloaded.
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TOWERS = {
    "kcfi-tiny": KCFIConfig.from_pretrained(embedded_model()).text_config.to_dict(),
    "google/vit-large-patch16-224-in21k": {"model_type": "vit", "image_size": 224, "patch_size": 16, **LARGE},
    "openai/clip-vit-large-patch14": {
        "model_type": "clip_vision_model",
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 768,
        **LARGE,
    },
    "facebook/dinov2-small": {
        "model_type": "dinov2",
        "image_size": 518,
        "patch_size": 14,
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2-1.5B-Instruct": QWEN2,
    # pretrained by `make tiny`
    "runs/tiny-vit": {
        "model_type": "timm_wrapper",
        "architecture": "xcit_nano_12_p8_224",
        "model_args": {"img_size": 256, "embed_dim": 128, "depth": 8, "num_heads": 4, "cls_attn_layers": 0},
    },
    "runs/tiny-lm": {
        "model_type": "qwen2",
        "vocab_size": 670,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


TOWERS["runs/blank-vit"], TOWERS["runs/blank-lm"] = TOWERS["runs/tiny-vit"], TOWERS["runs/tiny-lm"]


@pytest.fixture
def read(tmp_path):
    """A packaged recipe; this machine may have no GPU that bf16 needs."""

    def parse(name):
        return parse_recipe(name, ["--use_cpu", "--output_dir", str(tmp_path / "run")])

    return parse


def config_of(recipe):
    model = recipe.model
    if model.model is not None:  # those that others go on from are of the architecture of kcfi-tiny
        return KCFIConfig.from_pretrained(embedded_model())
    settings = {"image_token_id": 3, **model.model_settings}
    return KCFIConfig(vision_config=TOWERS[model.vision_model], text_config=TOWERS[model.text_model], **settings)


@pytest.mark.parametrize("name", NAMES)
def test_its_model_has_every_parameter_in_the_group_of_its_part(read, name):
    recipe = read(name)
    config = config_of(recipe)
    assert config.num_change_classes == num_classes(recipe.data.mask_classes)
    with torch.device("meta"):
        model = KCFIForConditionalGeneration(config)
    freeze(model, recipe.training)
    decayed = Trainer.get_decay_parameter_names(None, model)
    groups = parameter_groups(model, recipe.training, decayed)
    found = {}
    for group in groups:
        found.setdefault(group["name"], {"lr": group["lr"], "parameters": 0})
        found[group["name"]]["parameters"] += sum(parameter.numel() for parameter in group["params"])
        assert group["weight_decay"] in (0, recipe.training.weight_decay)
        assert group["weight_decay"] == 0 or all(parameter.ndim > 1 for parameter in group["params"])

    def size(*parts):
        return sum(parameter.numel() for part in parts if part is not None for parameter in part.parameters())

    parts, args = model.model, recipe.training
    expected = {
        "learning_rate": {
            "lr": args.learning_rate,
            "parameters": size(parts.stage_projection, parts.key_change_perceiver, parts.change_detection_head)
            + (size(parts.language_model) if args.train_language_model else 0),  # its output layer is tied
        },
        "vision_learning_rate": {
            "lr": args.vision_learning_rate,
            "parameters": size(parts.vision_tower) if args.train_vision_tower else 0,
        },
        "projector_learning_rate": {"lr": args.projector_learning_rate, "parameters": size(parts.projector)},
    }
    assert found == {name: group for name, group in expected.items() if group["parameters"]}
    learns = {parameter.requires_grad for parameter in parts.language_model.parameters()}
    whole = name.startswith("levir_few/") and name != "levir_few/frozen_language_model"
    assert learns == {args.train_language_model} == {name in ("small", "tiny_real", "own_pairs") or whole}


def test_pairs_of_ones_own_have_no_resolution_but_what_is_given(read):
    data = read("own_pairs").data
    assert (data.ground_sampling_distance, data.num_train_pairs, data.crops_per_scene) == (None, None, None)


def test_the_paper_recipe_is_what_the_defaults_are(read):
    recipe, default = read("paper"), KCFIConfig()
    config = config_of(recipe)
    for field in dataclasses.fields(KCFIConfig):
        if field.name not in ("vision_config", "text_config", "image_token_id"):
            assert getattr(config, field.name) == getattr(default, field.name), field.name
    assert config.vision_config.num_hidden_layers == default.vision_config.num_hidden_layers == 24
    assert config.text_config.hidden_size == default.text_config.hidden_size == 1536
    assert (config.num_patches, config.stage_width) == (256, 4096)
    args = recipe.training
    assert (args.dwa, args.dwa_temperature) == ("step", 0.2)
    assert recipe.data.captions_per_pair == 1  # not the default, which packs all five
    assert (args.learning_rate, args.vision_learning_rate, args.projector_learning_rate) == (1e-4, 1e-5, 1e-5)


def test_the_released_recipe_is_the_authors_code(read):
    recipe = read("released")
    config = config_of(recipe)
    assert (config.patch_size, config.image_size, config.num_patches) == (14, 224, 256)
    assert config.vision_feature_layers == [4, 10, 16, 22]
    assert (config.flow_residual, config.flow_scope, config.projector) == ("cross", "stage_and_global", "mlp2x_gelu")
    assert (recipe.training.dwa_temperature, recipe.training.num_train_epochs) == (2.0, 5)
    assert (recipe.model.shortest_edge, recipe.data.captions_per_pair) == (256, 1)


@pytest.mark.parametrize("name", NAMES)
def test_its_first_line_says_what_it_is_for(name):
    assert packaged_recipes()[name].read_text().startswith("# ")


@pytest.mark.parametrize("base", ABLATIONS)
def test_every_row_of_the_ablations_differs_from_its_base_by_its_own_setting(read, base):
    def settings(name):
        values = dict(read(name).values)
        return {**KCFIConfig().to_dict(), **values.pop("model_settings", {}), **values}

    first, [folder] = settings(base), {name.split("/")[0] for name in ABLATIONS[base]}
    assert ABLATIONS[base].keys() - {base} == {name for name in NAMES if name.startswith(f"{folder}/")} - {base}
    for name, difference in ABLATIONS[base].items():
        values = settings(name)
        changed = {key: values.get(key) for key in values.keys() | first if values.get(key) != first.get(key)}
        assert changed == difference, name


def test_the_synthetic_set_shows_every_row_with_the_papers_scores():
    plan, papers = read_set("synthetic_ablations"), read_set("ablations")
    shown = {row.recipe for row in plan.rows}
    assert shown == {packaged_recipes()[name] for name in ["synthetic/kcfi", *ABLATIONS["synthetic/kcfi"]]}
    printed = {(row.group, row.recipe.stem): row.paper for row in papers.rows}
    printed["Table III", "fine_tuned_128px"] = printed["Table III", "paper"]
    printed["Table III", "frozen_128px"] = printed["Table III", "frozen"]
    shown_scores = [(row.group, row.recipe.stem, row.paper) for row in plan.rows if row.paper]
    assert len(shown_scores) == 10
    for group, name, scores in shown_scores:
        expected = printed.get((group, name)) or printed[group, "paper"]
        assert scores.items() <= expected.items(), (group, name)


def test_the_real_set_asks_of_real_pairs_what_the_synthetic_one_asks_of_drawn_ones():
    plan, drawn = read_set("real_ablations"), read_set("synthetic_ablations")
    assert {row.recipe for row in plan.rows} == {
        packaged_recipes()[name] for name in ["real/kcfi", *ABLATIONS["real/kcfi"]]
    }
    asked = {(row.group, row.recipe.stem): (row.label, row.paper) for row in drawn.rows}
    for row in plan.rows:
        assert asked[row.group, row.recipe.stem] == (row.label, row.paper)
    claims = {(row.group, row.recipe.stem): (row.claim, row.drawn) for row in plan.rows if row.claim}
    assert len(claims) == 8 and claims["DWA", "kcfi"] == ("higher", "refuted")


def test_settings_are_chosen_on_val_and_the_curve_is_scored_on_test():
    choices, few = read_set("levir_choices"), read_set("levir_few")
    assert (choices.split, few.split) == ("val", "test")
    shown = {row.recipe for plan in (choices, few) for row in plan.rows}
    assert shown == {packaged_recipes()[name] for name in ["levir_few/pairs_608", *ABLATIONS["levir_few/pairs_608"]]}


def test_the_set_of_ablations_shows_every_row_with_the_papers_scores():
    plan = read_set("ablations")
    shown = {row.recipe for row in plan.rows}
    assert shown == {packaged_recipes()[name] for name in ["paper", "released", *ABLATIONS["paper"]]}
    assert len(plan.runs()) == len(shown) * len(plan.seeds) == 33
    scores = {(row.group, row.recipe.stem): (row.paper.get("bleu_4"), row.paper.get("cider_d")) for row in plan.rows}
    assert scores["Table III", "frozen"] == (53.15, 128.64)
    assert [scores["Table IV", name] for name in ("baseline", "cfe", "cdh", "paper")] == [
        (55.10, 130.38),
        (58.84, 136.17),
        (61.37, 137.08),
        (65.30, 138.25),
    ]
    assert scores["Fig. 7", "two_image_tokens"] == (55.10, 130.38) and scores["Fig. 7", "paper"] == (65.30, 138.25)
    for row in plan.rows:  # eq. 11; the paper prints 76.89 for + CFE, whose four scores give 76.98
        parts = [row.paper.get(name, 0) for name in ("bleu_4", "meteor", "rouge_l", "cider_d")]
        assert "s_m" not in row.paper or sum(parts) / 4 == pytest.approx(row.paper["s_m"], abs=0.1), row.label
