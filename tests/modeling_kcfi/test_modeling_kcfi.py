"""The whole model: towers of every kind, what fills `<image>`, losses, joining, generation, saving."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTImageProcessor,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kcfi import join_towers
from kcfi.modeling_kcfi import KCFIConfig, KCFIForConditionalGeneration, KCFIModel, modeling_kcfi

TOWERS = ["vit", "clip", "siglip", "dinov2", "dinov2_with_registers", "dinov3", "beit", "timm"]
LANGUAGE_MODELS = ["qwen2", "qwen3", "llama", "gpt2", "opt"]


def blocks_of(tower):
    """The list of blocks of any vision tower."""
    if tower.config.model_type == "timm_wrapper":
        return tower.timm_model.blocks
    return max((m for m in tower.modules() if isinstance(m, torch.nn.ModuleList)), key=len)


def block_outputs(tower, images, **kwargs):
    """Outputs of all blocks of a tower, caught by hooks: (B, tokens, C) each."""
    outputs = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks_of(tower)
    ]
    with torch.no_grad():
        tower(images, **kwargs)
    for hook in hooks:
        hook.remove()
    return outputs


def count_calls(module):
    """A list that grows by one at every forward of the module."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def assert_same_outputs(ours, theirs):
    for name in ("logits", "mask_logits", "loss"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-5, rtol=1e-5, msg=name)


# ---- vision tower ----


@pytest.mark.parametrize("tower", TOWERS)
def test_stage_features_are_block_outputs_before_the_final_norm_without_cls(make_model, make_inputs, vision, tower):
    model = make_model(tower).model
    pixels = make_inputs(pairs=2)["pixel_values"]
    with torch.no_grad():
        before, after, _ = model.get_stage_features(pixels)

    plain = AutoModel.from_config(AutoConfig.for_model(**vision[tower])).eval()  # with final norm and pooler
    plain.load_state_dict(model.vision_tower.state_dict(), strict=False)
    for date, maps in enumerate((before, after)):
        outputs = block_outputs(plain, pixels[:, date])
        assert len(maps) == 2
        for block, stage in zip((1, 3), maps, strict=True):
            assert stage.shape == (2, 32, 4, 4)
            patches = outputs[block - 1][:, -16:]
            torch.testing.assert_close(stage.flatten(2).transpose(1, 2), patches, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("size", [(16, 16), (24, 24), (8, 20)])
def test_any_size_that_the_patch_divides(make_model, make_inputs, tower, size):
    model = make_model(tower, image_size=24)
    with torch.no_grad():
        outputs = model(**make_inputs(size=size))
    assert outputs.mask_logits.shape == (2, 2, *size)
    assert torch.stack(outputs.image_outputs.pooler_output).shape == (2, size[0] * size[1] // 16, 32)
    assert outputs.logits.isfinite().all()


@pytest.mark.parametrize("layers", [[1, 3], [1, 2]])
@pytest.mark.parametrize("tower", TOWERS)
def test_every_parameter_gets_a_gradient(make_model, make_inputs, tower, layers):
    model = make_model(tower, vision_feature_layers=layers, flow_scope="stage_and_global").train()
    inputs = make_inputs()
    model(**inputs, labels=inputs["input_ids"], mask_labels=torch.ones(2, 16, 16, dtype=torch.long)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("tower", TOWERS)
def test_the_tower_ends_at_the_last_block_read(make_model, tower):
    model = make_model(tower, vision_feature_layers=[1, 2])
    assert len(blocks_of(model.model.vision_tower)) == 2
    assert model.config.tower.num_blocks == 3


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 3, 16, 16)])
def test_pixel_values_must_be_pairs(make_model, shape):
    with pytest.raises(ValueError, match=r"must be pairs, \(B, 2, 3, H, W\)"):
        make_model().get_image_features(torch.randn(shape))


def test_a_size_that_the_patch_does_not_divide_is_refused(make_model):
    with pytest.raises(ValueError, match="16 x 18 px do not divide into squares of 4 px"):
        make_model().get_image_features(torch.randn(1, 2, 3, 16, 18))


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_an_xcit_tower_computes_what_timm_does_at_any_size(make_model, make_inputs, vision, size):
    model = make_model("xcit", image_size=64).model
    pixels = make_inputs(size=size, patch=8)["pixel_values"]
    plain = AutoModel.from_config(AutoConfig.for_model(**vision["xcit"])).eval()
    assert plain.load_state_dict(model.vision_tower.state_dict(), strict=False).unexpected_keys == []
    with torch.no_grad():
        before, after, _ = model.get_stage_features(pixels)
        for date, maps in enumerate((before, after)):
            expected = plain.timm_model.forward_intermediates(pixels[:, date], indices=[0, 2], intermediates_only=True)
            torch.testing.assert_close(maps, expected)


def test_every_parameter_of_an_xcit_tower_gets_a_gradient(make_model, make_inputs):
    model = make_model("xcit", visual_token_pooling=2).train()
    inputs = make_inputs(size=(32, 32), patch=16)
    model(**inputs, labels=inputs["input_ids"], mask_labels=torch.ones(2, 32, 32, dtype=torch.long)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(("tower", "patch"), [("timm", 4), ("xcit", 8)])
def test_checkpointing_computes_the_blocks_of_a_timm_tower_twice_until_the_tower_leaves_it(
    make_model, make_inputs, tower, patch
):
    model, inputs = make_model(tower).train(), make_inputs(size=(4 * patch, 4 * patch), patch=patch)
    part = model.model.vision_tower
    norm = part.timm_model.blocks[0].norm1
    calls, passes, gradients = count_calls(norm), [], []
    switches = [part.activation_checkpointing_disable, model.activation_checkpointing_enable]
    for switch in [*switches, part.activation_checkpointing_disable]:
        switch()
        model.zero_grad()
        calls.clear()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        passes.append(len(calls))
        gradients.append(norm.weight.grad.clone())
    assert passes == [1, 2, 1]
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_an_xcit_model_survives_saving(make_model, make_inputs, tmp_path):
    model, inputs = make_model("xcit"), make_inputs(size=(32, 32), patch=8)
    model.save_pretrained(tmp_path)
    loaded = KCFIForConditionalGeneration.from_pretrained(tmp_path)
    labels = {"labels": inputs["input_ids"], "mask_labels": torch.ones(2, 32, 32, dtype=torch.long)}
    with torch.no_grad():
        assert_same_outputs(loaded(**inputs, **labels), model(**inputs, **labels))


# ---- what fills <image> ----


@pytest.mark.parametrize("visual_inputs", ["change", "bitemporal_change"])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_pooling_averages_the_visual_tokens_and_leaves_the_mask_alone(make_model, make_inputs, visual_inputs, size):
    count = 3 if visual_inputs == "bitemporal_change" else 1
    full = make_model(visual_inputs=visual_inputs, image_size=24)
    pooled = make_model(visual_inputs=visual_inputs, image_size=24, visual_token_pooling=2)
    with torch.no_grad():
        fine = full(**make_inputs(size=size, image_tokens=count))
        coarse = pooled(**make_inputs(size=size, image_tokens=count, patch=8))
    grid = torch.stack(fine.image_outputs.pooler_output).unflatten(
        1, (count, size[0] // 8, 2, size[1] // 8, 2)
    )  # (B,count,h,2,w,2,D)
    torch.testing.assert_close(
        torch.stack(coarse.image_outputs.pooler_output), grid.mean(dim=(3, 5)).flatten(1, 3), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(coarse.mask_logits, fine.mask_logits)


@pytest.mark.parametrize(("visual_inputs", "tokens"), [("change", 1), ("bitemporal", 2), ("bitemporal_change", 3)])
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_image_tokens_are_before_after_change_through_one_projector(
    make_model, make_inputs, visual_inputs, tokens, projector
):
    model = make_model(visual_inputs=visual_inputs, projector=projector)
    inputs = make_inputs(image_tokens=tokens)
    with torch.no_grad():
        outputs = model(**inputs)
        before, after, _ = model.model.get_stage_features(inputs["pixel_values"])
        change = model.model.key_change_perceiver(before, after)
        dates = [torch.cat([stage.flatten(2).transpose(1, 2) for stage in maps], dim=-1) for maps in (before, after)]
        read = {"change": [change], "bitemporal": dates, "bitemporal_change": [*dates, change]}[visual_inputs]
        layers = model.model.projector
        expected = torch.cat([features @ layers.linear_1.weight.T + layers.linear_1.bias for features in read], dim=1)
        if projector == "mlp2x_gelu":
            expected = F.gelu(expected) @ layers.linear_2.weight.T + layers.linear_2.bias
        torch.testing.assert_close(torch.stack(outputs.image_outputs.pooler_output), expected, atol=1e-4, rtol=1e-4)

        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        embeddings[:, : tokens * 16] = expected
        states = model.model.language_model(inputs_embeds=embeddings).last_hidden_state
        torch.testing.assert_close(outputs.logits, model.lm_head(states), atol=1e-3, rtol=1e-3)


def test_without_perceiver_the_change_is_the_absolute_difference(make_model, make_inputs):
    model = make_model(use_key_change_perceiver=False)
    pixels = make_inputs()["pixel_values"]
    with torch.no_grad():
        before, after, _ = model.model.get_stage_features(pixels)
        change = model.get_image_features(pixels).change_features
    difference = torch.cat([(a - b).abs() for b, a in zip(before, after, strict=True)], dim=1)
    torch.testing.assert_close(change, difference.flatten(2).transpose(1, 2))


def test_equal_dates_give_no_change_features_without_perceiver(make_model, make_inputs):
    pixels = make_inputs()["pixel_values"]
    pixels[:, 1] = pixels[:, 0]
    features = make_model(use_key_change_perceiver=False).get_image_features(pixels)
    assert features.change_features.abs().max() == 0


@pytest.mark.parametrize("context", ["after", "bitemporal"])
def test_change_context_is_beside_the_change_features_by_channel(make_model, make_inputs, context):
    model = make_model(change_context=context)
    inputs = make_inputs()
    with torch.no_grad():
        before, after, _ = model.model.get_stage_features(inputs["pixel_values"])
        change = model.get_image_features(inputs["pixel_values"]).change_features
        assert model(**inputs).mask_logits.shape == (2, 2, 16, 16)
    dates = {"after": [after], "bitemporal": [before, after]}[context]
    expected = [torch.cat(maps, dim=1).flatten(2).transpose(1, 2) for maps in dates]
    torch.testing.assert_close(change[..., 64:], torch.cat(expected, dim=-1))


def test_projected_stages_are_read_in_place_of_the_towers(make_model, make_inputs):
    """Normalised, mapped and bent per stage, alike at both dates; what a cache keeps is the tower's."""
    model, inputs = make_model(stage_projection_size=6, change_context="bitemporal"), make_inputs()
    with torch.no_grad():
        tower, _, _ = model.model.encode_dates(inputs["pixel_values"])
        before, _, _ = model.model.get_stage_features(inputs["pixel_values"])
        for linear, raw, stage in zip(model.model.stage_projection.linears, tower, before, strict=True):
            rows = raw.flatten(2).transpose(1, 2)
            rows = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            expected = F.gelu(rows @ linear.weight.T + linear.bias)
            torch.testing.assert_close(stage.flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-4)
        outputs = model(**inputs)
    assert model.config.change_width == 3 * len(before) * 6 == outputs.image_outputs.change_features.shape[-1]
    swapped = inputs["pixel_values"].flip(1)
    with torch.no_grad():
        _, after, _ = model.model.get_stage_features(swapped)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


def test_without_a_head_there_is_no_mask(make_model, make_inputs):
    model, inputs = make_model(use_change_detection_head=False), make_inputs()
    outputs = model(**inputs, labels=inputs["input_ids"], mask_labels=torch.zeros(2, 16, 16, dtype=torch.long))
    assert (outputs.mask_logits, outputs.mask_loss) == (None, None)
    assert outputs.loss == outputs.caption_loss


def test_table_iv_baseline_runs(make_model, make_inputs):
    model = make_model(visual_inputs="bitemporal", use_key_change_perceiver=False, use_change_detection_head=False)
    assert model(**make_inputs(image_tokens=2)).logits.shape == (2, 38, 99)


def test_a_wrong_number_of_placeholders_is_refused_with_both_numbers(make_model, make_inputs):
    model, inputs = make_model(), make_inputs(pairs=2)
    with pytest.raises(ValueError, match="tokens: 32, features: 16"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:1]})
    inputs["input_ids"][0, 0] = 7
    with pytest.raises(ValueError, match="tokens: 31, features: 32"):
        model(**inputs)


# ---- losses ----


def test_losses_are_cross_entropies_and_add_up(make_model, make_inputs):
    model, inputs = make_model(), make_inputs()
    labels = inputs["input_ids"].clone()
    labels[:, :16] = -100
    mask_labels = torch.randint(0, 2, (2, 16, 16))
    outputs = model(**inputs, labels=labels, mask_labels=mask_labels)
    caption = F.cross_entropy(outputs.logits[:, 15:-1].reshape(-1, 99), labels[:, 16:].reshape(-1))
    mask = F.cross_entropy(outputs.mask_logits, mask_labels)
    torch.testing.assert_close(outputs.caption_loss, caption)
    torch.testing.assert_close(outputs.mask_loss, mask)
    torch.testing.assert_close(outputs.loss, caption + mask)


@pytest.mark.parametrize(("chunk", "calls"), [(1024, 1), (7, 6)])
@pytest.mark.parametrize("num_items", [None, 9])
def test_training_scores_few_positions_at_a_time_with_equal_gradients(
    make_model, make_inputs, monkeypatch, chunk, calls, num_items
):
    monkeypatch.setattr(modeling_kcfi, "CHUNK", chunk)
    model, inputs = make_model().train(), make_inputs()
    labels = inputs["input_ids"].clone()
    labels[:, :16] = -100
    rows = []
    model.lm_head.register_forward_hook(lambda _module, _args, logits: rows.append(logits.shape[:-1].numel()))

    def loss_and_gradients(**options):
        model.zero_grad()
        outputs = model(**inputs, labels=labels, num_items_in_batch=num_items, **options)
        in_forward = len(rows)
        outputs.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return outputs, in_forward, {name: value.clone() for name, value in gradients.items() if value is not None}

    plain, _, plain_gradients = loss_and_gradients()
    rows.clear()
    chunked, in_forward, gradients = loss_and_gradients(skip_logits=True)
    assert chunked.logits is None and plain.logits is not None  # in training mode too, unless they are skipped
    assert in_forward == calls and max(rows) <= chunk
    torch.testing.assert_close(chunked.loss, plain.loss)
    torch.testing.assert_close(gradients, plain_gradients)


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_a_caption_has_a_caption_loss_of_zero_and_zero_gradients(make_model, make_inputs, training):
    model, inputs = make_model().train(training), make_inputs()
    loss = model(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).caption_loss
    assert loss == 0
    loss.backward()
    gradient = model.model.projector.linear_1.weight.grad
    assert gradient is not None and not gradient.any()


def test_a_mixed_batch_has_the_mask_loss_of_its_labelled_pair(make_model, make_inputs):
    model, inputs = make_model(), make_inputs()
    mask_labels = torch.randint(0, 2, (2, 16, 16))
    mask_labels[1] = 255
    mixed = model(**inputs, mask_labels=mask_labels).mask_loss
    alone = model(**{key: value[:1] for key, value in inputs.items()}, mask_labels=mask_labels[:1]).mask_loss
    torch.testing.assert_close(mixed, alone)


def test_a_batch_without_masks_trains_captions_only(make_model, make_inputs):
    model, inputs = make_model(), make_inputs()
    outputs = model(**inputs, labels=inputs["input_ids"], mask_labels=torch.full((2, 16, 16), 255))
    outputs.loss.backward()
    assert outputs.mask_loss == 0
    assert outputs.loss == outputs.caption_loss
    assert all(parameter.grad.abs().max() == 0 for parameter in model.model.change_detection_head.parameters())


def test_the_model_runs_and_trains_in_bf16(make_model, make_inputs):
    model, inputs = make_model(num_change_classes=3).bfloat16(), make_inputs()
    outputs = model(**inputs, labels=inputs["input_ids"], mask_labels=torch.full((2, 16, 16), 2))
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---- language models, saving ----


@pytest.mark.parametrize("language", LANGUAGE_MODELS)
def test_any_causal_lm_survives_saving(make_model, make_inputs, language, tmp_path):
    model, inputs = make_model(text=language), make_inputs()
    model.save_pretrained(tmp_path)
    loaded, report = KCFIForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert tied is model.config.tie_word_embeddings is (language != "llama")
    batch = inputs | {"labels": inputs["input_ids"], "mask_labels": torch.ones(2, 16, 16, dtype=torch.long)}
    assert_same_outputs(loaded(**batch), model(**batch))


@pytest.mark.parametrize("tower", TOWERS)
def test_every_tower_survives_saving(make_model, make_inputs, tower, tmp_path):
    settings = {"image_size": 24, "flow_scope": "stage_and_global", "projector": "mlp2x_gelu"}
    model, pixels = make_model(tower, **settings), make_inputs(size=(24, 24))["pixel_values"]
    model.save_pretrained(tmp_path)
    loaded, report = KCFIForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        ours, theirs = model.get_image_features(pixels), loaded.get_image_features(pixels)
    torch.testing.assert_close(ours.mask_logits, theirs.mask_logits)
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output)


def test_weights_in_a_pickle_are_refused(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        KCFIForConditionalGeneration.from_pretrained(tmp_path)


def test_the_base_model_loads_from_the_whole_models_folder(make_model, make_inputs, tmp_path):
    model, pixels = make_model(), make_inputs()["pixel_values"]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = KCFIModel.from_pretrained(tmp_path).get_image_features(pixels).mask_logits
        torch.testing.assert_close(loaded, model.get_image_features(pixels).mask_logits)


def test_eager_and_sdpa_attention_agree(make_model, make_inputs):
    model, inputs = make_model(), make_inputs()
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        fast = model(**inputs).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(**inputs).logits, fast, atol=1e-3, rtol=1e-3)


# ---- what vLLM's Transformers backend builds on ----


@pytest.mark.parametrize("tower", [*TOWERS, "xcit"])
def test_only_parameters_begin_on_meta_where_only_they_are_put_there(make_config, monkeypatch, tower):
    """vLLM loads the parameters, and leaves the buffers as they were made."""
    register = torch.nn.Module.register_parameter

    def register_on_meta(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"))

    monkeypatch.setattr(torch.nn.Module, "register_parameter", register_on_meta)
    model = KCFIModel(make_config(tower))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert [name for name, buffer in model.named_buffers() if buffer.is_meta] == []


def test_the_language_model_s_attention_is_the_one_that_is_registered(make_config, make_inputs, monkeypatch):
    calls = []

    def attention(module, *args, **kwargs):
        calls.append(module.layer_idx)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "counted", attention)
    config, inputs = make_config(), make_inputs()
    config.text_config._attn_implementation = "counted"
    model = AutoModel.from_config(config)  # the base model: the server has an output layer of its own
    assert type(model) is KCFIModel and model._supports_attention_backend
    with torch.no_grad():
        image = model.get_image_features(inputs["pixel_values"], return_dict=True)
        assert [tuple(features.shape) for features in image.pooler_output] == [(16, 32)] * 2  # one item per pair
        words = model.get_input_embeddings()(inputs["input_ids"])
        words[inputs["input_ids"] == config.image_token_id] = torch.cat(image.pooler_output)
        positions = torch.arange(words.shape[1]).expand(2, -1)
        states = model(inputs_embeds=words, position_ids=positions, use_cache=False, return_dict=False)[0]
    assert calls == [0, 1]
    with torch.no_grad():
        torch.testing.assert_close(states, model(**inputs).last_hidden_state)


# ---- joining pretrained towers ----


@pytest.mark.parametrize("pickled", ["vision", "text"])
def test_a_tower_in_a_pickle_is_refused_with_the_remedy(save_tower, save_language_model, pickled):
    folders = {"vision": save_tower("vit")[1], "text": save_language_model()[1]}
    file = Path(folders[pickled]) / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    with pytest.raises(OSError, match=rf"{pickled} has no weights as safetensors.*pytorch_model.bin.*save_pretrained"):
        join(**folders)


@pytest.fixture
def save_tower(vision, tmp_path):
    def save(name):
        torch.manual_seed(0)
        folder = tmp_path / "vision"
        halves = {
            "text_config": {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        }
        if name == "clip":
            tower = CLIPModel(CLIPConfig(vision_config=vision["clip"], **halves))
        elif name == "siglip":
            tower = SiglipModel(SiglipConfig(vision_config=vision["siglip"], **halves))
        else:
            tower = AutoModel.from_config(AutoConfig.for_model(**vision[name]))
        tower.eval().save_pretrained(folder)
        ViTImageProcessor().save_pretrained(folder)
        return getattr(tower, "vision_model", tower), str(folder)

    return save


@pytest.fixture
def save_language_model(text, tmp_path):
    def save(name="qwen2", image_token_id=4, **settings):
        words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 2, "<image>": image_token_id}, unk_token="<pad>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
        tokenizer.save_pretrained(tmp_path / "text")
        torch.manual_seed(1)
        language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(text[name] | settings))).eval()
        language_model.generation_config.update(do_sample=True, temperature=0.7, top_k=20)
        language_model.save_pretrained(tmp_path / "text")
        return language_model, str(tmp_path / "text")

    return save


def join(vision, text, **settings):
    return join_towers(vision, text, **{"vision_feature_layers": [1, 2], "head_hidden_size": 8, **settings})[0]


@pytest.mark.parametrize("tower", TOWERS)
def test_a_joined_vision_tower_gives_what_it_gave_alone(save_tower, save_language_model, make_inputs, tower, tmp_path):
    alone, vision = save_tower(tower)
    _, text = save_language_model()
    model, pixels = join(vision, text), make_inputs()["pixel_values"]
    outputs = block_outputs(alone, pixels[:, 0])
    with torch.no_grad():
        before, _, _ = model.model.get_stage_features(pixels)
        for stage, output in zip(before, outputs, strict=False):
            torch.testing.assert_close(stage.flatten(2).transpose(1, 2), output[:, -16:], atol=1e-5, rtol=1e-5)

    model.save_pretrained(tmp_path / "joined")
    assert str(tmp_path) not in (tmp_path / "joined" / "config.json").read_text()  # no folder of this machine
    loaded, report = KCFIForConditionalGeneration.from_pretrained(tmp_path / "joined", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    batch = make_inputs() | {"labels": make_inputs()["input_ids"], "mask_labels": torch.ones(2, 16, 16).long()}
    assert_same_outputs(loaded(**batch), model(**batch))


@pytest.mark.parametrize("language", LANGUAGE_MODELS)
def test_a_joined_language_model_gives_what_it_gave_alone(save_language_model, vision, language):
    alone, text = save_language_model(language)
    model = join(vision["vit"], text)
    words = torch.randint(5, 99, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=words).logits, alone(input_ids=words).logits)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied is alone.config.tie_word_embeddings


def test_a_joined_model_is_ready_to_run(save_language_model, vision):
    _, text = save_language_model()
    torch.manual_seed(0)
    model = join(vision["dinov2"], text, dtype=torch.bfloat16, stage_projection_size=64)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    parts = ("stage_projection", "key_change_perceiver", "projector", "change_detection_head")
    for part in (getattr(model.model, name) for name in parts):
        for name, parameter in part.named_parameters():
            assert parameter.isfinite().all()
            spread = parameter.float().std() if parameter.numel() > 1 else 0
            assert 0.01 < spread < 0.04 if name.endswith("weight") else parameter.abs().max() == 0, name


def test_a_joined_model_decodes_greedily_and_keeps_the_special_tokens(save_language_model, vision):
    _, text = save_language_model()
    generation = join(vision["vit"], text).generation_config
    assert not generation.do_sample
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, [2], 0)


def test_towers_of_two_precisions_have_that_of_the_language_model(save_tower, save_language_model, make_inputs):
    tower, (language_model, _) = save_tower("vit")[0], save_language_model()
    config = KCFIConfig(vision_config=tower.config, text_config=language_model.config, image_token_id=4)
    model = KCFIForConditionalGeneration.from_towers(config, tower, language_model.to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(**make_inputs()).logits.isfinite().all()


@pytest.mark.parametrize(("image_token_id", "vocabulary"), [(4, 99), (99, 100), (120, 121)])
@pytest.mark.parametrize("language", ["qwen2", "llama", "gpt2"])
def test_an_image_token_behind_the_vocabulary_is_added(
    save_language_model, vision, make_inputs, language, image_token_id, vocabulary
):
    alone, text = save_language_model(language, image_token_id)
    model, _ = join_towers(vision["vit"], text)
    assert model.config.text_config.vocab_size == vocabulary
    assert model.config.image_token_id == image_token_id
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == vocabulary
    inputs = make_inputs()
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == 4, model.config.image_token_id)
    with torch.no_grad():
        assert model(**inputs | {"input_ids": ids}).logits.shape == (2, 22, vocabulary)
        words = torch.randint(5, 99, (1, 7))
        torch.testing.assert_close(model(input_ids=words).logits[..., :99], alone(input_ids=words).logits)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gptj", {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}),  # a bias
        ("cohere", {"logit_scale": 0.5}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        ("opt", {"word_embed_proj_dim": 16, "ffn_dim": 37}),
    ],
)
def test_a_language_model_without_plain_logits_is_refused(tmp_path, vision, text, model_type, settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**(text["qwen2"] | {"model_type": model_type} | settings))
    language_model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(language_model.get_input_embeddings().weight)
    language_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{model_type}.* not a plain linear map"):
        join(vision["vit"], str(tmp_path))


# ---- generation ----


def test_a_batch_padded_on_the_left_generates_what_its_rows_generate_alone(make_model, make_inputs):
    model = make_model()
    short, long = make_inputs(pairs=1, words=3), make_inputs(pairs=1, words=8)
    long["pixel_values"] = long["pixel_values"].flip(-1)
    batch = {
        "input_ids": torch.cat([F.pad(short["input_ids"], (5, 0)), long["input_ids"]]),
        "attention_mask": torch.cat([F.pad(short["attention_mask"], (5, 0)), long["attention_mask"]]),
        "pixel_values": torch.cat([short["pixel_values"], long["pixel_values"]]),
    }
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = model.generate(**batch, **options)[:, -6:]
    for row, inputs in enumerate((short, long)):
        assert together[row].tolist() == model.generate(**inputs, **options)[0, -6:].tolist()
    assert together[0].tolist() != together[1].tolist()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_encodes_each_pair_once(make_model, make_inputs, num_beams):
    model, inputs = make_model(), make_inputs()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": num_beams, "do_sample": False}
    vision, language = count_calls(model.model.vision_tower), count_calls(model.model.language_model)
    generated = model.generate(**inputs, **options)
    assert (len(vision), len(language)) == (1, 5)

    encoded = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    again = model.generate(**inputs, mm_encoder_outputs={"image": encoded}, **options)
    assert len(vision) == 2
    assert again.tolist() == generated.tolist()


def test_generation_depends_on_the_images_and_their_order(make_model, make_inputs):
    model, inputs = make_model(change_context="after"), make_inputs()
    swapped = inputs | {"pixel_values": inputs["pixel_values"].flip(1)}
    with torch.no_grad():
        assert (model(**inputs).logits - model(**swapped).logits).abs().max() > 1e-2
        assert (model(**inputs).mask_logits - model(**swapped).mask_logits).abs().max() > 1e-2


def test_text_alone_runs_without_images(make_model):
    outputs = make_model()(input_ids=torch.randint(5, 99, (1, 4)))
    assert outputs.logits.shape == (1, 4, 99)
    assert outputs.mask_logits is None
