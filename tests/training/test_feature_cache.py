from pathlib import Path

import pytest
import torch

from kcfi.modeling_kcfi.modeling_kcfi import chunked_caption_loss
from kcfi.training.collator import KCFICollator
from kcfi.training.feature_cache import FeatureCache
from kcfi.training.trainer import KCFITrainer
from tests.training.test_trainer import arguments, break_gradients, losses


@pytest.fixture
def pixels():
    return torch.rand(3, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_features_are_computed_once_and_equal_the_towers(model, pixels, tmp_path):
    core = model.eval().model
    before, after, _ = core.get_stage_features(pixels)
    cache = FeatureCache(core, tmp_path)
    for counts in ((0, 6), (6, 6)):
        read = cache(pixels)
        assert (cache.read, cache.computed) == counts
        for maps, expected in zip(read[:2], (before, after), strict=True):
            for stage, other in zip(maps, expected, strict=True):
                torch.testing.assert_close(stage, other, rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.rglob("*.part"))


def test_an_odd_number_of_new_images_is_computed_and_put_in_its_place(model, pixels, tmp_path):
    cache = FeatureCache(model.eval().model, tmp_path)
    cache(pixels[:1])
    pixels[1, 0] = pixels[0, 1]  # now three of the six images are new: 1 after, 2 before, 2 after
    before, after, _ = cache(pixels)
    assert (cache.read, cache.computed) == (3, 5)
    whole = cache.encode(pixels)
    torch.testing.assert_close(torch.stack(before), torch.stack(whole[0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack(after), torch.stack(whole[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("other", ["weights", "layers", "pixels", "precision"])
def test_another_tower_or_image_or_precision_finds_no_entry(model, pixels, tmp_path, other):
    FeatureCache(model.eval().model, tmp_path)(pixels)
    if other == "weights":
        next(model.model.vision_tower.parameters()).data += 1e-3
    if other == "layers":
        model.config.vision_feature_layers = [1, 1]
    if other == "pixels":
        pixels = pixels + 1e-3
    cache = FeatureCache(model.model, tmp_path)
    with torch.autocast("cpu", torch.bfloat16, enabled=other == "precision"):
        cache(pixels)
    assert (cache.read, cache.computed) == (0, 6)


def test_a_run_with_a_cache_has_the_losses_and_scores_of_one_without(
    model, processor, make_pairs, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", "")  # scores without Java, which takes seconds to start
    logs, scores, state = [], [], model.state_dict()
    for folder in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        args = arguments(tmp_path, train_vision_tower=False, max_steps=4, feature_cache=folder, bf16=True)
        again = type(model)(model.config)
        again.load_state_dict(state)
        trainer = KCFITrainer(
            again,
            args,
            KCFICollator(processor),
            train_dataset=make_pairs(8),
            eval_dataset=make_pairs(4),
            processing_class=processor,
        )
        trainer.train()
        logs.append([line["loss"] for line in losses(trainer)])
        scores.append(trainer.evaluate()["eval_mask_f1"])
    assert logs[1] == pytest.approx(logs[0], rel=1e-3) and scores[1] == pytest.approx(scores[0], rel=1e-2)
    assert trainer.feature_cache.computed == 0  # the second run with it reads everything
    assert logs[2] == pytest.approx(logs[1], rel=1e-6)


def test_an_image_that_another_rank_has_computed_meanwhile_is_written_anew_on_windows(
    model, pixels, tmp_path, windows, monkeypatch
):
    cache = FeatureCache(model.eval().model, tmp_path)
    cache(pixels)
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as both saw it before
    cache(pixels)
    assert cache.computed == 12


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_itself_again_when_its_training_ends(model, processor, make_pairs, tmp_path, fails):
    args = arguments(tmp_path, train_vision_tower=False, max_steps=1, feature_cache=str(tmp_path / "cache"))
    trainer = KCFITrainer(
        model, args, KCFICollator(processor), train_dataset=make_pairs(4), processing_class=processor
    )
    if fails:
        break_gradients(model)
        with pytest.raises(FloatingPointError):
            trainer.train()
    else:
        trainer.train()
    assert trainer.feature_cache.computed > 0
    assert model.model.stage_cache is None and model.caption_loss_function is chunked_caption_loss


@pytest.mark.parametrize(
    ("settings", "augment", "reason"),
    [({}, False, "train_vision_tower: false"), ({"train_vision_tower": False}, True, "augment")],
)
def test_a_cache_that_would_be_wrong_is_refused(model, processor, make_pairs, tmp_path, settings, augment, reason):
    args = arguments(tmp_path, feature_cache=str(tmp_path / "cache"), **settings)
    with pytest.raises(ValueError, match=f"feature_cache: .*{reason}"):
        KCFITrainer(model, args, KCFICollator(processor, augment=augment), train_dataset=make_pairs(2))
