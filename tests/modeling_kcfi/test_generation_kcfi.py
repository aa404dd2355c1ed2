"""What a model must survive: ways to attend, generate, compile, checkpoint, offload, quantise and adapt it."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TorchAoConfig

from kcfi.modeling_kcfi import KCFIForConditionalGeneration
from tests.modeling_kcfi.test_modeling_kcfi import blocks_of, count_calls

LENGTH = {"max_new_tokens": 8, "min_new_tokens": 8}
MODES = {"greedy": {}, "beams": {"num_beams": 3}, "sampling": {"do_sample": True, "temperature": 1.5}}
OTHERS = ["vision_tower", "key_change_perceiver", "projector", "change_detection_head"]  # than the language model
PARTS = [*(f"model.{part}" for part in OTHERS), "model.language_model", "lm_head"]


@pytest.fixture
def batch(make_inputs):
    """Two pairs; the prompt of the first is shorter, padded on the left."""
    inputs = make_inputs()
    inputs["input_ids"] = torch.cat([torch.tensor([[0, 0, 0], [7, 8, 9]]), inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = torch.cat([torch.tensor([[0] * 3, [1] * 3]), inputs["attention_mask"]], dim=1)
    return inputs


@torch.no_grad()
def outputs(model, inputs):
    """Logits of all tokens but padding, and mask logits, as one vector."""
    said = model(**inputs)
    return torch.cat([said.logits[inputs["attention_mask"].bool()].flatten(), said.mask_logits.flatten()]).float()


def generate(model, inputs, **options):
    """The new tokens; sampling is seeded."""
    torch.manual_seed(3)
    return model.generate(**inputs, **({"do_sample": False} | LENGTH | options))[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def choices(model, inputs, tokens):
    """Logits (B, T', vocabulary) from which each of the new tokens (B, T') was taken."""
    ids = torch.cat([inputs["input_ids"], tokens], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], dim=1)
    return model(**inputs | {"input_ids": ids, "attention_mask": mask}).logits[:, -1 - tokens.shape[1] : -1]


def gradients(model, inputs):
    """Gradients of both losses by the name of their parameter."""
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"], mask_labels=torch.ones(2, 16, 16, dtype=torch.long)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def perturbed(model):
    """A copy that says something else."""
    torch.manual_seed(4)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return other


# ---- attention ----


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@pytest.mark.parametrize(("tower", "language"), [("vit", "qwen2"), ("dinov2", "llama"), ("siglip", "opt")])
def test_every_attention_implementation_gives_the_same(make_model, batch, tower, language, attention):
    model = make_model(tower, language)
    model.set_attn_implementation("sdpa")
    expected, tokens = outputs(model, batch), generate(model, batch)
    model.set_attn_implementation(attention)
    used = {part.config._attn_implementation for part in (model.model.vision_tower, model.model.language_model)}
    assert used == {attention}
    with torch.compiler.set_stance("force_eager"):  # flex unfused: on a CPU torch 2.14 cannot compile it with a mask
        torch.testing.assert_close(outputs(model, batch), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(generate(model, batch), tokens)


def test_a_timm_tower_keeps_its_attention_beside_another_in_the_language_model(make_model, batch):
    model = make_model("timm")
    expected = outputs(model, batch)
    model.set_attn_implementation({"text_config": "flex_attention"})
    assert model.model.language_model.config._attn_implementation == "flex_attention"
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(outputs(model, batch), expected, atol=1e-4, rtol=1e-4)


# ---- generation ----


@pytest.mark.parametrize(
    "cache", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}], ids=str
)
@pytest.mark.parametrize("mode", MODES)
def test_a_cache_changes_no_token(make_model, batch, mode, cache):
    model = make_model()
    tokens = generate(model, batch, **MODES[mode])
    assert torch.equal(generate(model, batch, **MODES[mode], **cache), tokens)
    assert not torch.equal(tokens, generate(perturbed(model), batch, **MODES[mode]))


def test_sampling_draws_and_beams_search(make_model, batch):
    model = make_model()
    greedy, beams, sampled = (generate(model, batch, **MODES[mode]) for mode in MODES)
    assert not torch.equal(sampled, greedy)
    assert torch.equal(generate(model, batch, do_sample=True, top_k=1), greedy)
    assert len(generate(model, batch, do_sample=True, num_return_sequences=3)) == 6

    def likelihood(tokens):  # of the new tokens, per row
        return choices(model, batch, tokens).log_softmax(-1).gather(2, tokens[..., None]).sum((1, 2))

    assert (likelihood(beams) >= likelihood(greedy) - 1e-4).all()
    assert (likelihood(beams) > likelihood(greedy) + 1e-4).any()


@pytest.mark.parametrize("kind", ["kcfi", "language model"])
def test_assisted_generation_says_what_greedy_says(make_model, make_inputs, kind):
    model, inputs = make_model(), make_inputs(pairs=1)
    assistant = perturbed(model) if kind == "kcfi" else AutoModelForCausalLM.from_config(model.config.text_config)
    drafts = count_calls(assistant.eval())
    assert torch.equal(generate(model, inputs, assistant_model=assistant), generate(model, inputs))
    assert drafts


def test_prompt_lookup_says_what_greedy_says_in_fewer_steps(make_model, make_inputs):
    model, inputs = make_model(), make_inputs(pairs=1)
    expected, steps = generate(model, inputs), count_calls(model)
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3), expected)
    assert len(steps) < LENGTH["max_new_tokens"]


# ---- compiling, checkpointing, precision ----


def test_a_new_model_compiles_as_one_graph_and_trains(make_model, make_inputs):
    model, inputs = make_model().train(), make_inputs()  # its first forward is the compiled one
    torch.compiler.reset()
    compiled = gradients(torch.compile(model, fullgraph=True, backend="eager"), inputs)
    for name, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(compiled[f"_orig_mod.{name}"], gradient, atol=1e-5, rtol=1e-4)


def test_generation_compiles_as_one_graph(make_model, batch):
    model = make_model()
    tokens = generate(model, batch)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(generate(model, batch, cache_implementation="static"), tokens)


@pytest.mark.parametrize(("tower", "language"), [("vit", "qwen2"), ("dinov2", "llama")])
def test_activation_checkpointing_computes_blocks_twice_and_changes_no_gradient(
    make_model, make_inputs, tower, language
):
    model, inputs = make_model(tower, language).train(), make_inputs()
    expected = gradients(model, inputs)
    model.activation_checkpointing_enable()
    blocks = blocks_of(model.model.vision_tower)[0], model.model.language_model.layers[0]
    calls = [count_calls(next(block.children())) for block in blocks]
    for name, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)
    assert [len(times) for times in calls] == [2, 2]


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str)
def test_a_model_loads_and_runs_in_half_precision(make_model, batch, tmp_path, dtype, error):
    model = make_model()
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path)
    loaded = KCFIForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert loaded(**batch).logits.dtype == dtype
    assert (outputs(loaded, batch) - expected).abs().max() < error * expected.abs().max()


def ranks(reference, inputs, tokens, slack):
    """The rank of each new token, 0 = best, among the reference's next tokens; what lies within `slack` is as good."""
    logits = choices(reference, inputs, tokens)
    logits[..., reference.config.image_token_id] = -torch.inf
    return (logits > logits.gather(2, tokens[..., None]) + slack).sum(-1)


ATTENTIONS = ["eager", "sdpa", "flex_attention"]
SLACK = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}  # of logits, by the precision that may change them
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 3},
    "assisted": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", SLACK)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generation(make_model, make_inputs, batch, attention, dtype, way):
    """Every cell of the table in docs/deployment.md takes tokens that the plain model, sdpa in fp32, prefers."""
    reference = make_model()
    model = copy.deepcopy(reference).to(getattr(torch, dtype))
    model.set_attn_implementation(attention)
    inputs = make_inputs(pairs=1) if way == "assisted" else batch  # the batch is padded on the left
    options = WAYS[way] | {"suppress_tokens": [model.config.image_token_id]}
    with torch.compiler.set_stance("force_eager"):  # flex unfused
        tokens = generate(model, inputs, **options)
        others = generate(perturbed(model), inputs, **options)
    best = 3 if way in ("beams", "sampling") else 1
    assert (ranks(reference, inputs, tokens, SLACK[dtype]) < best).all()
    assert not (ranks(reference, inputs, others, SLACK[dtype]) < best).all()


# ---- placing, quantising, adapting ----


@pytest.mark.parametrize("on_disk", [PARTS, PARTS[:4], PARTS[4:], []], ids=["all", "vision", "language", "auto"])
def test_a_model_with_parts_on_disk_gives_the_same(make_model, batch, tmp_path, on_disk):
    model = make_model("dinov2", "llama")
    model.save_pretrained(tmp_path)
    places = {part: "disk" if part in on_disk else "cpu" for part in PARTS} if on_disk else "auto"
    loaded = KCFIForConditionalGeneration.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off")
    offloaded = {name.split(".")[1] for name, parameter in loaded.named_parameters() if parameter.is_meta}
    assert offloaded == {part.split(".")[1] if "." in part else "weight" for part in on_disk}
    assert torch.equal(outputs(loaded, batch), outputs(model, batch))
    assert torch.equal(generate(loaded, batch), generate(model, batch))


def test_a_model_larger_than_the_memory_given_is_split_between_its_blocks(make_model, batch, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = KCFIForConditionalGeneration.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": "100KB"}, offload_folder=tmp_path / "off"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(outputs(loaded, batch), outputs(model, batch))


def test_torchao_quantises_the_language_model_alone(make_model, batch, tmp_path):
    quantisers = pytest.importorskip("torchao.quantization")
    model = make_model()
    model.save_pretrained(tmp_path / "full")
    settings = TorchAoConfig(quantisers.Int8WeightOnlyConfig(), modules_to_not_convert=[*PARTS[:4], "lm_head"])
    small = KCFIForConditionalGeneration.from_pretrained(tmp_path / "full", quantization_config=settings)
    quantised = [name for name, weight in small.named_parameters() if type(weight.data) is not torch.Tensor]
    assert len(quantised) == 14 and all(name.startswith("model.language_model.layers.") for name in quantised)
    expected, found = model(**batch), small(**batch)
    assert torch.equal(found.mask_logits, expected.mask_logits)
    assert not torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.logits, expected.logits, atol=0.05, rtol=0)
    generate(small, batch)

    small.save_pretrained(tmp_path / "small")
    loaded = KCFIForConditionalGeneration.from_pretrained(tmp_path / "small")
    assert torch.equal(outputs(loaded, batch), outputs(small, batch))
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("small", "full")]
    assert sizes[0] < sizes[1]


def test_an_adapter_of_peft_is_merged_and_taken_off_again(make_model, batch, tmp_path):
    model = make_model()
    start = outputs(model, batch)
    layers = LoraConfig(r=4, target_modules=r"model\.language_model\..*_proj", init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), layers)
    expected, tokens = outputs(adapted, batch), generate(adapted, batch)
    assert not torch.allclose(expected, start, atol=1e-2)
    adapted.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.equal(outputs(loaded, batch), expected)
    assert torch.equal(outputs(loaded.unload(), batch), start)
    merged = adapted.merge_and_unload()
    assert type(merged) is KCFIForConditionalGeneration
    torch.testing.assert_close(outputs(merged, batch), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(generate(merged, batch), tokens)
