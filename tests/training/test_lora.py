import copy

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from kcfi.models import merge_lora
from kcfi.training.arguments import ModelArguments
from kcfi.training.collator import KCFICollator
from kcfi.training.lora import add_lora
from kcfi.training.train import build_model
from kcfi.training.trainer import KCFITrainer
from tests.training.test_trainer import Gradients, arguments, losses

PARTS = {"vision_tower", "key_change_perceiver", "projector", "change_detection_head"}


@pytest.fixture
def make_trainer(model, processor, make_pairs, tmp_path):
    """A trainer of a copy of the model with adapters; every call gives the same weights."""

    def make(lora=(("r", 4),), callbacks=None, **settings):
        torch.manual_seed(5)
        adapted, args = copy.deepcopy(model), arguments(tmp_path / "run", **settings)
        add_lora(adapted, dict(lora), args)
        pairs = {"train_dataset": make_pairs(8), "eval_dataset": make_pairs(4)}
        collator = KCFICollator(processor, seed=3)
        return KCFITrainer(adapted, args, collator, processing_class=processor, callbacks=callbacks, **pairs)

    return make


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")


@pytest.fixture
def outputs(make_pairs, processor):
    """What a model says of two pairs, both parts of it."""
    pairs = [make_pairs(2)[index] for index in range(2)]
    images = [[pair["image_before"], pair["image_after"]] for pair in pairs]
    inputs = processor(images=images, text=[processor.prompt()] * 2, return_tensors="pt")

    @torch.no_grad()
    def run(network):
        said = network.eval()(**inputs)
        return torch.cat([said.logits.flatten(), said.mask_logits.flatten()])

    return run


def adapters(network):
    return {name for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def trained(network):
    """The parts of the model that train: "lora", or a name of PARTS."""
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    return {"lora" if ".lora_" in name else name.split(".")[1] for name in names}


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "fc1", "linear"]}], ids=["all", "some"])
def test_only_the_language_model_gets_adapters_and_its_own_weights_are_frozen(make_trainer, lora):
    trainer = make_trainer(lora)  # the tower has layers of these names too
    found = adapters(trainer.model)
    assert len(found) == (2 if lora else 14)  # of 2 blocks
    assert all(name.startswith("model.language_model.layers.") for name in found)
    assert trained(trainer.model) == PARTS | {"lora"}
    rates = {id(p): group["name"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert {rates[id(p)] for n, p in trainer.model.named_parameters() if ".lora_" in n} == {"learning_rate"}


def test_a_frozen_tower_is_left_out_of_the_adapter(make_trainer):
    trainer = make_trainer(train_vision_tower=False)
    assert trained(trainer.model) == PARTS - {"vision_tower"} | {"lora"}


def test_the_best_run_loads_as_a_model_as_an_adapter_and_merged(make_trainer, model, outputs, tmp_path, no_java):
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}  # the greatest: the first checkpoint
    trainer = make_trainer(max_steps=4, **settings, **best)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "run"
    first, last = (load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 4))
    saved = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], first[name]) for name in saved)
    assert any(not torch.equal(first[name], last[name]) for name in first)

    expected = outputs(trainer.model)
    assert not torch.allclose(expected, outputs(model), atol=1e-3)
    assert torch.equal(outputs(AutoModelForImageTextToText.from_pretrained(folder)), expected)
    loaded = copy.deepcopy(model)
    loaded.load_adapter(str(folder))
    assert torch.equal(outputs(loaded), expected)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    assert torch.equal(outputs(peft_model), expected)

    for merged in (peft_model.merge_and_unload(), build_model(ModelArguments(model=str(folder)))[0]):
        torch.testing.assert_close(outputs(merged), expected, rtol=1e-5, atol=1e-5)
        assert merged.state_dict().keys() == model.state_dict().keys()
    assert all(parameter.requires_grad for parameter in merged.parameters())
    plain = copy.deepcopy(model)
    assert merge_lora(plain) is plain and torch.equal(outputs(plain), outputs(model))


def test_the_start_of_a_run_is_saved_beside_its_adapter(make_trainer, model, outputs, tmp_path):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    trainer.save_model()
    (tmp_path / "run" / "adapter_config.json").unlink()  # else it is loaded with the adapter
    assert torch.equal(outputs(AutoModelForImageTextToText.from_pretrained(tmp_path / "run")), outputs(model))


def test_a_resumed_run_with_dropout_in_its_adapters_has_bit_identical_losses(make_trainer, tmp_path):
    settings = {"lora": {"r": 4, "lora_dropout": 0.5}, "max_steps": 4, "save_steps": 2}
    full = make_trainer(**settings, save_strategy="steps")
    full.train()
    torch.manual_seed(1234)
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [line["loss"] for line in losses(resumed)] == [line["loss"] for line in losses(full)]
    without = make_trainer(max_steps=4)
    without.train()
    assert losses(without)[-1]["caption_loss"] != losses(full)[-1]["caption_loss"]  # the dropout was on


def test_evaluation_uses_the_adapters(make_trainer, no_java):
    trainer = make_trainer(max_steps=8, lr_scheduler_type="constant")
    before = trainer.evaluate()["eval_caption_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_caption_loss"]
    assert after < before
    for name, parameter in trainer.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    assert trainer.evaluate()["eval_caption_loss"] > after


def test_activation_checkpointing_changes_no_gradient_of_an_adapter(make_trainer):
    gradients = []
    for checkpointing in (False, True):
        keep = Gradients()
        make_trainer(callbacks=[keep], max_steps=1, activation_checkpointing=checkpointing).train()
        gradients.append(keep.first)
    assert any(".lora_B." in name and gradient.abs().max() > 0 for name, gradient in gradients[0].items())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_adapters_stay_in_fp32_beside_weights_in_bf16(make_trainer):
    full, trainer = (make_trainer(max_steps=4, bf16_language_model=half) for half in (False, True))
    for run in (full, trainer):
        run.train()
    words = trainer.model.model.language_model
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in words.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    for line, other in zip(losses(trainer), losses(full), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"lora_alfa": 8}, "Unknown entry of lora 'lora_alfa': did you mean 'lora_alpha'"),
        ({"modules_to_save": ["lm_head"]}, "Unknown entry of lora 'modules_to_save'"),
        ({"r": "many"}, "lora: "),
        ({"r": 0}, "lora: .*should be a positive integer"),
        ({"target_modules": ["patch_embeddings"]}, "lora: "),
    ],
    ids=str,
)
def test_unfit_settings_are_refused(make_trainer, lora, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(lora)


def test_adapters_beside_a_language_model_that_trains_are_refused(make_trainer):
    with pytest.raises(ValueError, match="leave out lora, or train_language_model"):
        make_trainer(train_language_model=True)
