import copy
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import ParallelismConfig
from PIL import Image
from timm.optim import NAdamW
from torch._dynamo.utils import counters
from torch.utils.data import Subset
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainerCallback, TrainingArguments

from kcfi import join_towers
from kcfi.modeling_kcfi import KCFIForConditionalGeneration
from kcfi.processing import InputError
from kcfi.training.checks import REFUSED
from kcfi.training.collator import KCFICollator, packed_attention_mask
from kcfi.training.losses import evaluation_losses
from kcfi.training.parameters import freeze, parameter_groups
from kcfi.training.scoring.evaluate import CAPTION_METRICS, predict
from kcfi.training.trainer import KCFITrainer, trackers
from tests.training.conftest import arguments, needs_deepspeed

JAVA = shutil.which("java") is not None

ZERO = [pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3")]
ALL_KINDS = [
    pytest.param(None, marks=pytest.mark.slow, id="ddp"),
    pytest.param("zero2", marks=[pytest.mark.slow, needs_deepspeed]),
    pytest.param("zero2_offload", marks=[pytest.mark.slow, needs_deepspeed]),
    pytest.param("zero3", marks=needs_deepspeed),
    pytest.param("zero3_offload", marks=[pytest.mark.slow, needs_deepspeed]),
]


TWO_RANKS = {
    "max_steps": 12,
    "max_grad_norm": 0,
    "weight_decay": 0.1,
    "train_language_model": True,
    "lr_scheduler_type": "constant",
}  # of the tests of two ranks and their script


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self):
        self.first = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def break_gradients(model):
    """Losses stay finite, gradients do not."""
    model.model.projector.register_forward_hook(
        lambda _, __, output: output.register_hook(lambda gradient: gradient * float("inf")) and None
    )


def losses(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# Freezing and parameter groups


def test_the_language_model_is_frozen_and_everything_else_trains(model, tmp_path):
    freeze(model, arguments(tmp_path))
    language = {id(p) for part in (model.model.language_model, model.lm_head) for p in part.parameters()}
    assert all(p.requires_grad == (id(p) not in language) for p in model.parameters())


def test_a_frozen_vision_tower_gets_no_optimizer_group(model, tmp_path):
    args = arguments(tmp_path, train_vision_tower=False)
    freeze(model, args)
    names = {group["name"] for group in parameter_groups(model, args, [])}
    assert names == {"learning_rate", "projector_learning_rate"}


def test_every_trainable_parameter_is_in_one_group_with_its_rate_and_decay(make_trainer, make_pairs):
    trainer = make_trainer(make_pairs(), weight_decay=0.1)
    model, optimizer = trainer.model, trainer.create_optimizer()
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trainable)
    assert groups.keys() == trainable
    assert groups[id(model.model.projector.linear_1.weight)]["lr"] == 1e-3
    assert groups[id(model.model.projector.linear_1.bias)]["weight_decay"] == 0.0
    assert groups[id(model.model.change_detection_head.linear.weight)]["lr"] == 1e-2
    assert groups[id(model.model.change_detection_head.linear.weight)]["weight_decay"] == 0.1
    assert {groups[id(p)]["name"] for p in model.model.vision_tower.parameters()} == {"vision_learning_rate"}


PLAIN = {"lr": 1e-3, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("model.projector.linear_1.weight", lambda ps: torch.optim.Muon(ps, adjust_lr_fn="match_rms_adamw", **PLAIN)),
        ("model.projector.linear_1.bias", lambda ps: NAdamW(ps, **PLAIN)),
        ("model.vision_tower.layers.0.mlp.fc1.weight", lambda ps: NAdamW(ps, **PLAIN)),
        ("model.change_detection_head.classifier.weight", lambda ps: NAdamW(ps, lr=1e-2, weight_decay=0.0)),
    ],
)
def test_muon_moves_new_matrices_and_nadamw_all_else(make_trainer, make_pairs, name, reference):
    keep, settings = Gradients(), {"weight_decay": 0.0, "warmup_steps": 0, "max_grad_norm": 0}
    trainer = make_trainer(make_pairs(), callbacks=[keep], max_steps=1, muon=True, **settings)
    weight = trainer.model.get_parameter(name)
    before = weight.detach().clone()
    expected = torch.nn.Parameter(before.clone())
    trainer.train()
    expected.grad = keep.first[name]
    reference([expected]).step()
    step, difference = expected.detach() - before, weight.detach() - expected.detach()
    assert difference.norm() < 0.35 * step.norm()  # timm's and torch's Muon differ by 0.25, half a step by 0.48


def test_muon_resumes_exactly(make_trainer, make_pairs):
    settings = {"max_steps": 6, "muon": True, "save_strategy": "steps", "save_steps": 2}
    whole, again = make_trainer(make_pairs(), **settings), make_trainer(make_pairs(), **settings)
    whole.train()
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    others = dict(again.model.named_parameters())
    assert all(torch.equal(weight, others[name]) for name, weight in whole.model.named_parameters())


@pytest.mark.parametrize("muon", [True, False])
def test_a_run_does_not_switch_to_or_from_muon(make_trainer, make_pairs, muon):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    began, other = (make_trainer(make_pairs(), muon=value, **settings) for value in (not muon, muon))
    began.train()
    with pytest.raises(InputError, match=f"checkpoint-1 was written by a run with muon={not muon}, .*muon={muon}"):
        other.train(resume_from_checkpoint=f"{began.args.output_dir}/checkpoint-1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp": True}, "muon: it needs whole matrices"),
        ({"optim": "adafactor"}, "place of optim=adafactor"),
    ],
)
def test_what_muon_cannot_go_with_is_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        arguments(tmp_path, muon=True, **settings)


def test_a_frozen_module_with_dropout_drops_nothing_out(model, processor, make_trainer, make_pairs):
    model.model.language_model.config.attention_dropout = 0.5
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    first, second = (make_trainer(make_pairs(4), max_steps=1) for _ in range(2))
    first.train()
    torch.manual_seed(99)
    second.train()
    assert losses(first)[0]["caption_loss"] == losses(second)[0]["caption_loss"]


def test_batch_norms_keep_the_statistics_of_their_tower(text_model, processor, make_pairs, tmp_path):
    size = {"img_size": 32, "depth": 2, "embed_dim": 16, "num_heads": 2}
    tower = {"model_type": "timm_wrapper", "architecture": "xcit_nano_12_p8_224", "model_args": size}
    model, _ = join_towers(tower, str(text_model))
    norm = model.model.vision_tower.timm_model.patch_embed.proj[0][1]
    weight, mean = norm.weight.detach().clone(), norm.running_mean.clone()
    args = arguments(tmp_path, max_steps=2)
    KCFITrainer(model, args, KCFICollator(processor), train_dataset=make_pairs(8), processing_class=processor).train()
    assert torch.equal(norm.running_mean, mean) and not torch.equal(norm.weight, weight)


def test_a_frozen_module_without_dropout_stays_in_training_mode(model, tmp_path):
    assert freeze(model, arguments(tmp_path)) == []  # transformers checkpoints activations only in training mode


# Losses


@pytest.mark.parametrize(
    ("masks", "captions"),
    [("all", "all"), ("some", "all"), ("none", "all"), ("all", "some"), ("all", "none"), ("some", "some")],
)
def test_gradients_do_not_depend_on_how_a_step_is_cut(make_trainer, make_pairs, masks, captions):
    gradients = []
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        keep = Gradients()
        make_trainer(
            make_pairs(8, masks, captions),
            callbacks=[keep],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0,
        ).train()
        gradients.append(keep.first)
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[0].values())
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(
                other.get(name, torch.zeros(())).expand_as(gradient), gradient, rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("captions_per_pair", [1, 3])
def test_logged_losses_are_the_models_own_over_the_whole_step(make_trainer, make_pairs, processor, captions_per_pair):
    pairs, collator = make_pairs(8, masks="some"), KCFICollator(processor, captions_per_pair=captions_per_pair, seed=3)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = make_trainer(pairs, collator, **settings)
    batch = collator([pairs[index] for index in range(8)])
    del batch["filenames"]
    batch["attention_mask"] = packed_attention_mask(batch.pop("segment_ids"), "sdpa", torch.float32)
    with torch.no_grad():
        expected = trainer.model(**batch)

    positions = []
    trainer.model.lm_head.register_forward_hook(lambda _, states, __: positions.append(len(states[0])))
    trainer.train()
    prompt = int((batch["labels"] == -100).all(dim=0).int().argmin())  # columns before the first learned token
    assert max(positions) <= 4 * (batch["labels"].shape[1] - prompt)  # of four pairs; no logits for the prompt
    logged = losses(trainer)[0]
    assert logged["caption_loss"] == pytest.approx(expected.caption_loss.item(), rel=1e-5)
    assert logged["mask_loss"] == pytest.approx(expected.mask_loss.item(), rel=1e-5)
    assert logged["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)


def test_the_weighted_losses_add_up_to_the_loss_that_trains(make_trainer, make_pairs):
    trainer = make_trainer(make_pairs(8), dwa="step", dwa_temperature=0.2, max_steps=6)
    trainer.train()
    log = losses(trainer)
    for line in log:
        total = line["caption_weight"] * line["caption_loss"] + line["mask_weight"] * line["mask_loss"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert [line["caption_weight"] for line in log[:2]] == [1.0, 1.0]
    assert log[3]["caption_weight"] != 1.0
    ratios = [math.exp(log[2][f"{task}_loss"] / log[1][f"{task}_loss"] / 0.2) for task in ("caption", "mask")]
    assert log[3]["caption_weight"] == pytest.approx(2 * ratios[0] / sum(ratios), rel=1e-4)


def test_equal_weights_without_dwa(make_trainer, make_pairs):
    trainer = make_trainer(make_pairs(8), dwa="none", max_steps=4)
    trainer.train()
    assert {line["mask_weight"] for line in losses(trainer)} == {1.0}


def test_an_epoch_is_a_window_of_all_its_optimizer_steps(make_trainer, make_pairs):
    trainer = make_trainer(
        make_pairs(12), dwa="epoch", per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=3
    )
    trainer.train()
    weights = [line["mask_weight"] for line in losses(trainer)]  # 2 steps per epoch
    assert weights[:4] == [1.0] * 4
    assert weights[4] == weights[5] != 1.0


def test_captions_alone_are_trained_with_weight_one_and_said_once(make_trainer, make_pairs, caplog):
    trainer = make_trainer(make_pairs(8, masks="none"), max_steps=4)
    trainer.train()
    log = losses(trainer)
    assert all(line["caption_weight"] == 1.0 and "mask_loss" not in line for line in log)
    assert log[-1]["caption_loss"] < log[0]["caption_loss"]
    assert sum("captions are trained alone" in record.getMessage() for record in caplog.records) == 1


def test_masks_alone_are_trained_with_weight_one_and_said_once(make_trainer, make_pairs, caplog):
    trainer = make_trainer(make_pairs(8, captions="none"), max_steps=4)
    projector = trainer.model.model.projector.linear_1
    before = projector.weight.detach().clone(), projector.bias.detach().clone()
    trainer.train()
    log = losses(trainer)
    assert all(line["mask_weight"] == 1.0 and "caption_loss" not in line for line in log)
    assert [line["loss"] for line in log] == [line["mask_loss"] for line in log]
    assert log[-1]["mask_loss"] < log[0]["mask_loss"] and log[-1]["captions"] == 0
    torch.testing.assert_close(projector.weight, before[0], rtol=1e-4, atol=0)  # nothing but its weight decay
    assert torch.equal(projector.bias, before[1])
    assert sum("masks are trained alone" in record.getMessage() for record in caplog.records) == 1


def test_a_step_with_nothing_to_learn_from_is_refused(text_model, vision, processor, make_pairs, tmp_path):
    model, _ = join_towers(vision, str(text_model), use_change_detection_head=False)
    pairs = make_pairs(4, captions="none")
    trainer = KCFITrainer(model, arguments(tmp_path), KCFICollator(processor), train_dataset=pairs)
    with pytest.raises(
        ValueError, match=r"step 1 has no caption, and no mask for a change detection head.*pair_0\.png"
    ):
        trainer.train()


# Settings of Trainer

OTHER_VALUES = {
    "compute_loss_func": max,
    "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False,
    "use_cache": True,
    "preprocess_logits_for_metrics": max,
    "prediction_loss_only": True,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "train_sampling_strategy": "sequential",
    "auto_find_batch_size": True,
    "enable_jit_checkpoint": True,
    "parallelism_config": ParallelismConfig(),
    "remove_unused_columns": True,
    "label_names": ["mask_labels"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_would_change_nothing_is_refused_by_name(make_trainer, make_pairs, name):
    given = {name: OTHER_VALUES[name]}
    is_option = name in ("compute_loss_func", "preprocess_logits_for_metrics")
    options, settings = (given, {}) if is_option else ({}, given)
    with pytest.raises(InputError, match=f"KCFITrainer takes no {name}="):
        make_trainer(make_pairs(4), options=options, **settings)


def test_noise_on_embeddings_is_added_or_refused(model, make_trainer, make_pairs):
    plain, noisy = (make_trainer(make_pairs(4), max_steps=1, neftune_noise_alpha=alpha) for alpha in (None, 5.0))
    plain.train()
    noisy.train()
    assert losses(plain)[0]["caption_loss"] != losses(noisy)[0]["caption_loss"]
    model.model.language_model.config.attention_dropout = 0.5
    with pytest.raises(InputError, match="neftune_noise_alpha adds noise in training mode"):
        make_trainer(make_pairs(4), neftune_noise_alpha=5.0)


def test_an_optimizer_class_of_the_caller_gets_the_groups(make_trainer, make_pairs):
    options = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"momentum": 0.5})}
    trainer = make_trainer(make_pairs(4), options=options, max_steps=1)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["name"] for group in optimizer.param_groups} >= {"learning_rate", "vision_learning_rate"}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}


def test_an_optimizer_of_the_caller_trains(model, processor, make_pairs, tmp_path):
    args = arguments(tmp_path, max_steps=1, lr_scheduler_type="constant")
    optimizer = torch.optim.SGD(model.model.change_detection_head.parameters(), lr=0.25)
    head = model.model.change_detection_head.linear.weight
    before = head.detach().clone()
    trainer = KCFITrainer(
        model, args, KCFICollator(processor), train_dataset=make_pairs(4), optimizers=(optimizer, None)
    )
    trainer.train()
    assert losses(trainer)[0]["learning_rate"] == 0.25 and not torch.equal(head, before)


@pytest.mark.parametrize(("towers", "twice"), [("both", [2, 2]), ("vision", [2, 1]), ("language", [1, 2])])
def test_activation_checkpointing_runs_the_tower_named_twice_and_changes_no_gradient(
    make_trainer, make_pairs, towers, twice
):
    gradients, passes = [], []
    for settings in ({}, {"activation_checkpointing": True, "activation_checkpointing_towers": towers}):
        keep, calls = Gradients(), ([], [])
        trainer = make_trainer(make_pairs(4), callbacks=[keep], max_steps=1, **settings)
        parts = trainer.model.model
        first = parts.vision_tower.layers[0].layernorm_before, parts.language_model.layers[0].self_attn
        for part, times in zip(first, calls, strict=True):
            part.register_forward_hook(lambda *_, times=times: times.append(1))
        trainer.train()
        gradients.append(keep.first)
        passes.append([len(times) for times in calls])
    assert passes == [[1, 1], twice]  # the second time in the backward pass
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_compiled_training_has_the_same_losses_and_compiles_longer_captions_once_more(make_trainer, make_pairs):
    gradients, rounds = [], []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch.compiler.reset()
        counters.clear()
        keep = Gradients()
        pairs = make_pairs(12)
        trainer = make_trainer(pairs, callbacks=[keep], per_device_train_batch_size=2, max_steps=6, **settings)
        trainer.train()
        gradients.append(keep.first)
        rounds.append([entry["loss"] for entry in losses(trainer)])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)
    assert rounds[1] == pytest.approx(rounds[0], rel=1e-3)
    assert 0 < counters["stats"]["unique_graphs"] <= 10  # five pieces, for the first length and then for all


def test_the_side_of_the_training_images_is_saved_with_the_model(
    make_trainer, make_pairs, processor, tmp_path, monkeypatch
):
    class Larger(make_pairs):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            nearest = Image.Resampling.NEAREST
            images = ("image_before", "image_after", "mask")
            return example | {key: example[key].resize((40, 36), nearest) for key in images}

    monkeypatch.setattr(processor, "tile_size", None)
    trainer = make_trainer(Larger())
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert AutoProcessor.from_pretrained(tmp_path / "model").tile_size == 40


def test_both_losses_fall(make_trainer, make_pairs):
    settings = {"dwa": "window", "dwa_window": 5, "dwa_temperature": 2.0, "train_language_model": True}
    trainer = make_trainer(make_pairs(8), max_steps=30, lr_scheduler_type="constant", **settings)
    trainer.train()
    log = losses(trainer)
    assert log[-1]["mask_loss"] < 0.5 * log[0]["mask_loss"]
    assert log[-1]["caption_loss"] < 0.5 * log[0]["caption_loss"]


def test_the_log_holds_rates_counts_and_speed(make_trainer, make_pairs, processor):
    collator = KCFICollator(processor, captions_per_pair=3)
    trainer = make_trainer(
        make_pairs(8), collator, gradient_accumulation_steps=2, max_steps=2, lr_scheduler_type="constant"
    )
    trainer.train()
    last = losses(trainer)[-1]
    assert (last["pairs"], last["captions"], last["step"]) == (16, 48, 2)
    assert last["learning_rate"] == pytest.approx(1e-2)
    assert last["vision_learning_rate"] == last["projector_learning_rate"] == pytest.approx(1e-3)
    assert last["captions_per_second"] == pytest.approx(3 * last["pairs_per_second"])
    assert last["pairs_per_second"] > 0
    assert last["peak_memory_mib"] > 100  # torch alone takes more


def test_tensorboard_shows_the_log_and_the_samples_of_every_evaluation(make_trainer, make_pairs, tmp_path, no_java):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "report_to": ["tensorboard"]}
    trainer = make_trainer(make_pairs(8), eval_dataset=make_pairs(12), **settings, metric_for_best_model="mask_f1")
    trainer.train()
    events = accumulator.EventAccumulator(str(next((tmp_path / "runs").iterdir()))).Reload()
    names = ["caption_loss", "mask_loss", "caption_weight", "mask_weight", "learning_rate", "vision_learning_rate"]
    names += ["projector_learning_rate", "pairs_per_second", "captions_per_second", "peak_memory_mib"]
    for name in names:
        logged = [(line["step"], line[name]) for line in losses(trainer)]
        assert [(event.step, event.value) for event in events.Scalars(f"train/{name}")] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in logged
        ]
    pictures = events.Images("eval/samples")
    assert [picture.step for picture in pictures] == [1, 2]
    for step, picture in enumerate(pictures, start=1):
        shown = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)).convert("RGB"))
        assert np.array_equal(shown, np.asarray(Image.open(tmp_path / "samples" / f"step-{step}.png")))


def test_trackers_are_none_tensorboard_or_those_that_are_named(monkeypatch, caplog):
    assert trackers(["none"]) == [] and trackers(["tensorboard", "wandb"]) == ["tensorboard", "wandb"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert trackers(["tensorboard", "wandb"]) == ["wandb"]
    assert "TensorBoard is not installed" in caplog.text


def test_the_progress_bar_shows_the_losses_and_the_speed(make_trainer, make_pairs, capsys):
    make_trainer(make_pairs(4), max_steps=1, disable_tqdm=False).train()
    last = capsys.readouterr().err.split("\r")[-1]
    assert all(name in last for name in ("caption=", "mask=", "pairs/s="))


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(make_trainer, make_pairs):
    trainer = make_trainer(make_pairs(4), max_steps=3)
    with torch.no_grad():
        trainer.model.model.projector.linear_1.bias[0] = float("nan")
    head = trainer.model.model.change_detection_head.linear.weight
    before = head.detach().clone()
    with pytest.raises(FloatingPointError, match=r"Optimizer step 1: caption loss nan.*pair_0\.png"):
        trainer.train()
    assert torch.equal(head, before)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(make_trainer, make_pairs):
    trainer = make_trainer(make_pairs(4), max_steps=3)
    break_gradients(trainer.model)
    before = trainer.model.model.projector.linear_1.weight.detach().clone()
    with pytest.raises(
        FloatingPointError, match=r"Optimizer step 1: the losses are finite, but the norm .* is (nan|inf)"
    ):
        trainer.train()
    assert torch.equal(trainer.model.model.projector.linear_1.weight, before)


# Plain Trainer


class PlainCollator:
    """What `transformers.Trainer` gives to the model: inputs and labels alone."""

    def __init__(self, processor):
        self.collator = KCFICollator(processor, captions_per_pair=1)

    def __call__(self, examples):
        batch = self.collator([{**example, "captions": ["no change has occurred ."]} for example in examples])
        batch["attention_mask"] = packed_attention_mask(batch.pop("segment_ids"), "sdpa", torch.float32)
        del batch["filenames"], batch["sizes"]
        return batch


def plain_trainer(model, processor, folder, pairs, keep=None, **settings):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        max_grad_norm=0,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        ddp_find_unused_parameters=True,
        **settings,
    )
    callbacks = [] if keep is None else [keep]
    return Trainer(model, args, PlainCollator(processor), train_dataset=pairs, eval_dataset=pairs, callbacks=callbacks)


def test_a_plain_trainer_averages_both_losses_over_micro_batches(model, processor, make_pairs, tmp_path):
    """Pairs that carry as much as each other, so that the mean of the micro-batches is that of the step."""
    gradients = []
    for size, accumulation in ((4, 1), (1, 4)):
        keep = Gradients()
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = plain_trainer(copy.deepcopy(model), processor, tmp_path, make_pairs(4), keep, **settings)
        trainer.train()
        gradients.append(keep.first)
    for name in ("model.change_detection_head.linear.weight", "model.projector.linear_1.weight"):
        assert gradients[0][name].abs().max() > 1e-4
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("masks", "label_names"), [("all", None), ("none", ["labels"])])
def test_a_plain_trainer_evaluates_and_predicts_with_a_loss(
    model, processor, make_pairs, tmp_path, masks, label_names
):
    settings = {"label_names": label_names, "per_device_eval_batch_size": 2}
    trainer = plain_trainer(model, processor, tmp_path, make_pairs(4, masks=masks), **settings)
    with torch.no_grad():
        expected = model(**PlainCollator(processor)([make_pairs(4, masks=masks)[index] for index in range(4)])).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.predict(make_pairs(4, masks=masks)).metrics["test_loss"] == pytest.approx(expected.item(), rel=1e-5)


# Evaluation


def test_evaluation_scores_generated_captions_and_masks(make_trainer, make_pairs):
    trainer = make_trainer(make_pairs(8), eval_dataset=make_pairs(6), per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    expected = {
        "eval_bleu_4",
        "eval_rouge_l",
        "eval_cider_d",
        "eval_change_accuracy",
        "eval_mask_f1",
        "eval_mask_mean_iou",
    }
    assert expected | {"eval_loss", "eval_caption_loss", "eval_mask_loss"} <= metrics.keys()
    assert ("eval_s_m" in metrics) == JAVA
    assert all(0 <= metrics[name] <= 100 for name in expected - {"eval_cider_d"})


def test_bf16_trains_and_evaluates_in_autocast(make_trainer, make_pairs, processor, no_java):
    collator = KCFICollator(processor, captions_per_pair=2)
    full = make_trainer(make_pairs(4), collator, max_steps=2)
    full.train()
    settings = {"bf16": True, "max_steps": 2, "dataloader_num_workers": 1}
    trainer = make_trainer(make_pairs(4), collator, eval_dataset=make_pairs(4), **settings)
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    for line, other in zip(losses(trainer), losses(full), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-2)
        assert line["loss"] != other["loss"]
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("autocast", [False, True])
def test_a_frozen_language_model_in_bf16_trains_all_else_in_fp32_and_resumes(
    make_trainer, make_pairs, no_java, tmp_path, autocast
):
    settings = {"bf16": autocast, "max_steps": 4}
    full = make_trainer(make_pairs(8), **settings)
    full.train()
    settings |= {"bf16_language_model": True, "eval_dataset": make_pairs(4)}
    trainer = make_trainer(make_pairs(8), **settings, save_strategy="steps", save_steps=2)
    trainer.train()
    model, words = trainer.model, trainer.model.model.language_model
    assert {parameter.dtype for parameter in [*words.parameters(), *model.lm_head.parameters()]} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert {buffer.dtype for buffer in words.buffers()} == {torch.float32}
    for line, other in zip(losses(trainer), losses(full), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-2)
        assert line["loss"] != other["loss"]
    assert trainer.evaluate()["eval_loss"] > 0

    resumed = make_trainer(make_pairs(8), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [line["loss"] for line in losses(resumed)] == [line["loss"] for line in losses(trainer)]
    loaded = KCFIForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-4")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].float()), name


def test_evaluation_losses_are_those_of_the_first_captions(make_trainer, make_pairs, processor, no_java):
    pairs = make_pairs(6, masks="some")
    trainer = make_trainer(pairs, eval_dataset=pairs, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    sums = {"caption": [0.0, 0], "mask": [0.0, 0]}
    prompt = processor.encode_prompt()
    for index in range(6):  # one by one, without padding
        batch = KCFICollator(processor).for_evaluation()([pairs[index]])
        answer = batch["labels"]
        with torch.no_grad():
            outputs = trainer.model(
                input_ids=torch.cat([batch["input_ids"], answer], dim=1),
                labels=torch.cat([torch.full((1, len(prompt)), -100), answer], dim=1),
                pixel_values=batch["pixel_values"],
                mask_labels=batch.get("mask_labels"),
            )
        sums["caption"][0] += outputs.caption_loss.item() * answer.numel()
        sums["caption"][1] += answer.numel()
        if outputs.mask_loss is not None:
            sums["mask"][0] += outputs.mask_loss.item()
            sums["mask"][1] += 1
    assert metrics["eval_caption_loss"] == pytest.approx(sums["caption"][0] / sums["caption"][1], rel=1e-4)
    assert metrics["eval_mask_loss"] == pytest.approx(sums["mask"][0] / sums["mask"][1], rel=1e-4)


def test_predictions_are_captions_by_filename(make_trainer, make_pairs, no_java):
    trainer = make_trainer(make_pairs(4))
    output = trainer.predict(make_pairs(3))
    assert output.predictions.keys() == {"pair_0.png", "pair_1.png", "pair_2.png"}
    assert all(isinstance(caption, str) for caption in output.predictions.values())


def test_compute_metrics_gets_captions_and_masks_of_every_pair_and_joins_the_scores(make_trainer, make_pairs, no_java):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"captions": np.float64(7), "eval_masks": 8}

    pairs = make_pairs(5, masks="some", captions="some")
    options = {"compute_metrics": compute_metrics}
    trainer = make_trainer(pairs, eval_dataset=pairs, options=options, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    assert (metrics["eval_captions"], metrics["eval_masks"]) == (7, 8) and "eval_mask_f1" in metrics
    assert type(metrics["eval_captions"]) is float
    [(predictions, labels)] = seen
    predicted = list(trainer.predict(pairs).predictions.values())
    assert predictions[0] == predicted
    assert [mask.shape for mask in predictions[1]] == [(32, 32)] * 5
    assert labels[0] == [pairs[index]["captions"] for index in range(5)]
    for mask, index in zip(labels[1], range(5), strict=True):
        if index % 3:
            assert np.array_equal(mask, np.asarray(pairs[index]["mask"]) // 255)
        else:
            assert mask is None


def test_a_score_of_compute_metrics_may_choose_the_checkpoint(make_trainer, make_pairs, no_java):
    settings = {"max_steps": 1, "eval_strategy": "steps", "metric_for_best_model": "mine"}
    options = {"compute_metrics": lambda prediction: {"mine": 3.0}}
    trainer = make_trainer(make_pairs(4), eval_dataset=make_pairs(2), options=options, **settings)
    trainer.train()
    assert trainer.state.best_metric == 3.0


def test_pairs_without_captions_count_in_the_scores_of_masks_alone(make_trainer, make_pairs, no_java):
    described = make_trainer(make_pairs(4), eval_dataset=Subset(make_pairs(6), [0, 2, 3, 5])).evaluate()
    some = make_trainer(make_pairs(4), eval_dataset=make_pairs(6, captions="some")).evaluate()
    every = make_trainer(make_pairs(4), eval_dataset=make_pairs(6)).evaluate()
    for name in ("eval_caption_loss", "eval_bleu_1", "eval_rouge_l", "eval_cider_d", "eval_change_accuracy"):
        assert some[name] == pytest.approx(described[name], rel=1e-5), name
    for name in ("eval_mask_loss", "eval_mask_f1", "eval_mask_mean_iou"):
        assert some[name] == pytest.approx(every[name], rel=1e-5), name


def test_a_split_without_sentences_has_scores_of_masks_alone(make_trainer, make_pairs):
    trainer = make_trainer(make_pairs(4), eval_dataset=make_pairs(4, captions="none"))
    metrics = trainer.evaluate()
    assert not {f"eval_{name}" for name in (*CAPTION_METRICS, "caption_loss")} & metrics.keys()
    assert metrics["eval_loss"] == metrics["eval_mask_loss"] > 0 and "eval_mask_f1" in metrics
    assert trainer.predict(make_pairs(4, captions="none")).predictions.keys() == {f"pair_{n}.png" for n in range(4)}


@pytest.mark.parametrize("metric", ["cider_d", "eval_change_accuracy"])
def test_a_checkpoint_score_of_captions_is_refused_where_there_are_none(make_trainer, make_pairs, metric):
    settings = {"eval_strategy": "steps", "metric_for_best_model": metric}
    with pytest.raises(InputError, match=r"no pair of the evaluation split has a sentence.*mask_f1"):
        make_trainer(make_pairs(4), eval_dataset=make_pairs(4, captions="none"), **settings)
    make_trainer(make_pairs(4), eval_dataset=make_pairs(4, captions="some"), **settings)
    make_trainer(make_pairs(4), eval_dataset=make_pairs(4, captions="none"), eval_strategy="no")


def test_a_checkpoint_score_that_needs_java_is_refused_before_training(make_trainer, make_pairs, no_java):
    with pytest.raises(ValueError, match="needs METEOR, and so Java"):
        make_trainer(make_pairs(4), eval_dataset=make_pairs(4), eval_strategy="steps")


# Checkpoints


def test_the_best_checkpoint_is_kept_and_loads_with_the_auto_classes(make_trainer, make_pairs, no_java):
    trainer = make_trainer(
        make_pairs(8),
        eval_dataset=make_pairs(4),
        max_steps=6,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="mask_f1",
    )
    trainer.train()
    scores = {line["step"]: line["eval_mask_f1"] for line in trainer.state.log_history if "eval_mask_f1" in line}
    best = max(scores.values())
    assert trainer.state.best_metric == best == scores[trainer.state.best_global_step]

    folder = trainer.state.best_model_checkpoint
    loaded, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name]), name
    assert processor.encode_prompt() == trainer.processing_class.encode_prompt()


@pytest.mark.parametrize(
    "settings",
    [{"dwa": "step"}, {"dwa": "window", "dwa_window": 3}, {"dwa": "epoch"}, {"dwa": "step", "logging_steps": 4}],
    ids=str,
)
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_resumed_run_has_bit_identical_losses(make_trainer, make_pairs, settings, stop):
    settings |= {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "save_steps": stop,
    }
    pairs = make_pairs(8, masks="some")  # 4 steps per epoch: the checkpoints are in and between epochs
    full = make_trainer(pairs, save_strategy="steps", **settings)
    full.train()
    checkpoint = Path(full.args.output_dir) / f"checkpoint-{stop}"

    torch.manual_seed(1234)  # a new process has another random state
    resumed = make_trainer(pairs, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    names = ["loss", "caption_loss", "caption_weight", "mask_loss", "learning_rate", "pairs", "captions", "step"]
    assert [[line.get(name) for name in names] for line in losses(resumed)] == [
        [line.get(name) for name in names] for line in losses(full)
    ]


@pytest.fixture
def launch(launched):
    """Runs a script of this folder on two ranks."""

    def run(script, *options):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [str(Path(__file__).with_name(script)), *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True, env=launched, check=False)
        assert done.returncode == 0, done.stderr[-4000:]

    return run


@pytest.fixture
def run_two_ranks(launch):
    """What two_ranks.py finds with the model in a folder."""

    def run(folder, name, settings, *checkpoint):
        launch("two_ranks.py", folder, name, json.dumps(settings), *checkpoint)
        return torch.load(folder / f"{name}.pt", weights_only=True)

    return run


def saved(trainer, folder):
    """The folder, with the model and the processor of a trainer in it."""
    trainer.model.save_pretrained(folder / "model")
    trainer.processing_class.save_pretrained(folder / "model")
    return folder


@pytest.mark.slow
def test_a_plain_trainer_on_two_ranks_trains_both_losses_like_one(launch, model, processor, make_pairs, tmp_path):
    keep = Gradients()
    one = plain_trainer(model, processor, tmp_path, make_pairs(4), keep, per_device_train_batch_size=4)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    launch("plain_two_ranks.py", tmp_path)
    one.train()
    two = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert two.keys() == keep.first.keys()
    for name, gradient in keep.first.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("deepspeed", ALL_KINDS)
def test_two_ranks_train_score_and_save_like_one(
    run_two_ranks, make_trainer, make_pairs, processor, tmp_path, no_java, deepspeed
):
    keep = Gradients()
    one = make_trainer(
        make_pairs(8, masks="some", captions="some"),
        KCFICollator(processor, captions_per_pair=2, seed=3),
        callbacks=[keep],
        eval_dataset=make_pairs(5, captions="some"),
        per_device_train_batch_size=8,
        **TWO_RANKS,
    )
    results = run_two_ranks(saved(one, tmp_path), "two", {"deepspeed": deepspeed})
    one.train()
    metrics = one.evaluate()

    if deepspeed is None:  # ZeRO has used up its gradients when a callback could see them
        assert results["gradients"].keys() == keep.first.keys()
        for name, gradient in keep.first.items():
            torch.testing.assert_close(results["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
    for line, other in zip(losses(one), json.loads(results["log"]), strict=True):
        for name in ("loss", "caption_loss", "mask_loss", "caption_weight", "learning_rate", "pairs", "captions"):
            assert other[name] == pytest.approx(line[name], rel=1e-4), f"{name} of step {line['step']}"
    assert metrics["eval_mask_f1"] > 10 and results["eval_pairs"] == 5  # which compute_metrics counted
    for name in ("eval_caption_loss", "eval_mask_loss", "eval_mask_f1", "eval_rouge_l"):
        assert results[name] == pytest.approx(metrics[name], rel=1e-2)

    loaded = KCFIForConditionalGeneration.from_pretrained(tmp_path / "two")
    batch = one.evaluation_collator([make_pairs(5)[index] for index in range(5)])
    with torch.no_grad():
        features = loaded.get_image_features(batch["pixel_values"])
        torch.testing.assert_close(evaluation_losses(loaded, batch, features), results["losses"])
        predictions = predict(loaded, processor, batch, features, 16)
    assert [pair.caption for pair in predictions] == results["captions"]
    for pair, mask in zip(predictions, results["masks"], strict=True):
        assert torch.equal(torch.from_numpy(pair.mask), mask)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [None, *ZERO])
def test_two_ranks_resume_with_the_same_losses(run_two_ranks, make_trainer, make_pairs, tmp_path, deepspeed):
    folder = saved(make_trainer(make_pairs()), tmp_path)
    settings = {"deepspeed": deepspeed, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    full = run_two_ranks(folder, "full", settings)
    resumed = run_two_ranks(folder, "resumed", settings, str(folder / "full" / "checkpoint-3"))
    logs = [json.loads(results["log"]) for results in (full, resumed)]
    measured = {"pairs_per_second", "captions_per_second", "peak_memory_mib"}
    for line, other in zip(*logs, strict=True):
        assert {name: line[name] for name in line.keys() - measured} == {
            name: other[name] for name in other.keys() - measured
        }
    assert full["captions"] == resumed["captions"]


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [None, *ZERO])
def test_a_gradient_that_is_not_finite_stops_two_ranks_too(
    run_two_ranks, make_trainer, make_pairs, tmp_path, deepspeed
):
    one = make_trainer(make_pairs())
    results = run_two_ranks(saved(one, tmp_path), "two", {"deepspeed": deepspeed, "broken": True})
    assert re.match("Optimizer step 1: the losses are finite, but the norm .* is (nan|inf)", results["error"])
    weights = KCFIForConditionalGeneration.from_pretrained(tmp_path / "two").state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in one.model.state_dict().items())
