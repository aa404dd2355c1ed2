import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from kcfi import KCFIConfig, KCFIForConditionalGeneration
from kcfi.models import load
from kcfi.processing import INSTRUCTIONS, ChangeCaptioningPipeline, Describer, KCFIProcessor

SHORT = {"max_new_tokens": 6}


@pytest.fixture
def make_captioner(make_tokenizer):
    """A pipeline over a tiny model with random weights."""

    def make(processor_settings=None, **config):
        processor = KCFIProcessor.from_towers(
            make_tokenizer("plain"), image_size=32, patch_size=8, **(processor_settings or {})
        )
        processor.tile_size = 50  # the side of `pair`
        torch.manual_seed(0)
        tiny = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        config = KCFIConfig(
            vision_config={"model_type": "vit", "num_hidden_layers": 4, "image_size": 32, "patch_size": 8, **tiny},
            text_config={
                "model_type": "qwen2", "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 420,
                "initializer_range": 0.3, **tiny,
            },
            image_token_id=processor.image_token_id,
            **{"num_change_classes": 3, **config},
        )  # fmt: skip
        model = KCFIForConditionalGeneration(config).eval()
        for name, parameter in model.named_parameters():
            if "change_detection_head" in name:  # masks of several classes, whatever the model's own start
                torch.nn.init.zeros_(parameter) if name.endswith("bias") else torch.nn.init.normal_(parameter)
        return pipeline("change-captioning", model=model, processor=processor, device="cpu")

    return make


@pytest.fixture
def captioner(make_captioner):
    return make_captioner()


def same(result, expected):
    return (
        result["caption"] == expected["caption"]
        and np.array_equal(result["mask"], expected["mask"])
        and result["score"] == pytest.approx(expected["score"], rel=1e-4)
        and result["changed_fraction"] == pytest.approx(expected["changed_fraction"])
    )


def test_a_pair_gives_a_caption_and_a_mask_of_its_size(captioner, pair):
    assert isinstance(captioner, ChangeCaptioningPipeline)
    result = captioner(pair, **SHORT)
    assert set(result) == {"caption", "caption_box", "mask", "changed_fraction", "changed_probability", "score"}
    assert result["caption_box"] == (0, 0, *pair[0].size)
    assert isinstance(result["caption"], str) and result["caption"]
    assert (result["mask"].mode, result["mask"].size) == ("L", pair[0].size)
    ids = np.asarray(result["mask"])
    assert set(np.unique(ids)) <= {0, 1, 2}
    assert result["changed_fraction"] == pytest.approx((ids > 0).mean())
    assert 0 < result["changed_fraction"] < 1
    assert 0 < result["score"] < 1


def test_every_way_to_give_a_pair_is_the_same(captioner, pair, tmp_path):
    expected = captioner(pair, **SHORT)
    files = [tmp_path / "before.png", tmp_path / "after.png"]
    for image, file in zip(pair, files, strict=True):
        image.save(file)
    stacked = np.stack([np.asarray(image) for image in pair])
    example = {"image_before": pair[0], "image_after": pair[1], "captions": []}
    for one in (tuple(pair), files, [str(file) for file in files], stacked, torch.tensor(stacked).permute(0, 3, 1, 2)):
        assert same(captioner(one, **SHORT), expected)
    assert same(captioner(example, **SHORT), expected)
    for many in ([pair], [files], [example], stacked[None], [stacked]):
        (result,) = captioner(many, **SHORT)
        assert same(result, expected)


def test_a_batch_gives_what_single_pairs_give(captioner, make_image):
    pairs = [[make_image(seed, 40 + seed, 50), make_image(seed + 10, 40 + seed, 50)] for seed in range(5)]
    expected = [captioner(pair, **SHORT) for pair in pairs]
    assert len({result["caption"] for result in expected}) > 1
    for batch_size in (1, 2):
        results = captioner(pairs, batch_size=batch_size, **SHORT)
        assert all(map(same, results, expected))


def test_two_pairs_are_not_taken_for_one(captioner, pair):
    assert len(captioner([pair, pair[::-1]], **SHORT)) == 2
    example = {"image_before": pair[0], "image_after": pair[1]}
    assert len(captioner([example, example], **SHORT)) == 2


def test_a_data_set_is_streamed(captioner, pair):
    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"image_before": pair[0], "image_after": pair[1], "filename": str(index)}

    results = captioner(Examples(), batch_size=2, **SHORT)
    assert not isinstance(results, list)
    assert all(same(result, captioner(pair, **SHORT)) for result in results)


def test_the_score_is_the_geometric_mean_of_the_token_probabilities(captioner, pair):
    result = captioner(pair, **SHORT)
    processor, model = captioner.processor, captioner.model
    inputs = processor(images=[pair], text=[processor.prompt()], return_tensors="pt")
    tokens = model.generate(**inputs, **SHORT, **processor.generation_tokens)
    logits = model(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits
    start = inputs["input_ids"].shape[1]
    log_probabilities = logits[0, start - 1 : -1].log_softmax(dim=-1)
    chosen = log_probabilities.gather(1, tokens[0, start:, None])
    assert result["score"] == pytest.approx(chosen.mean().exp().item(), rel=1e-4)
    assert processor.post_process_image_text_to_text(tokens[:, start:]) == [result["caption"]]


def test_padding_behind_a_short_caption_does_not_change_its_score(captioner, make_image):
    pairs = [[make_image(seed), make_image(seed + 10)] for seed in range(4)]
    processor = captioner.processor
    inputs = processor(images=pairs, text=[processor.prompt()] * 4, return_tensors="pt")
    tokens = captioner.model.generate(**inputs, **SHORT)[:, inputs["input_ids"].shape[1] :]
    # a token that comes early in one caption and not in another becomes the end token
    early = next(token for row in tokens.tolist() for token in row[:3] if any(token not in r for r in tokens.tolist()))
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(early)
    expected = [captioner(pair, **SHORT) for pair in pairs]
    assert all(map(same, captioner(pairs, batch_size=4, **SHORT), expected))


def test_a_chat_message_with_two_images_gives_the_same_caption(captioner, pair, caplog):
    chat = pipeline("image-text-to-text", model=captioner.model, processor=captioner.processor)
    assert "not supported" not in caplog.text
    content = [*({"type": "image", "image": image} for image in pair), {"type": "text", "text": INSTRUCTIONS[0]}]
    messages = [{"role": "user", "content": content}]
    caption = captioner(pair, **SHORT)["caption"]
    ((answer,), (whole,)) = (chat(text=messages, return_full_text=full, **SHORT) for full in (False, True))
    assert answer["generated_text"] == caption
    assert whole["generated_text"] == [*messages, {"role": "assistant", "content": caption}]


def test_beam_search_is_an_argument(captioner, pair):
    greedy, beams = captioner(pair, **SHORT), captioner(pair, num_beams=3, **SHORT)
    assert 0 < beams["score"] < 1
    assert np.array_equal(greedy["mask"], beams["mask"])


def test_the_instruction_is_an_argument(captioner, pair):
    first, other = captioner(pair, **SHORT), captioner(pair, instruction=INSTRUCTIONS[3], **SHORT)
    assert same(captioner(pair, instruction=INSTRUCTIONS[0], **SHORT), first)
    assert other["score"] != first["score"]


def test_the_images_are_encoded_once(captioner, pair):
    calls = []
    captioner.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    captioner(pair, **SHORT)
    assert len(calls) == 1


def test_without_a_head_there_is_no_mask(make_captioner, pair):
    captioner = make_captioner(use_change_detection_head=False)
    for result in (captioner(pair, **SHORT), *captioner([pair, pair], batch_size=2, **SHORT)):
        assert result["mask"] is None and result["changed_fraction"] is None
        assert result["caption"]


def test_the_border_that_a_crop_hides_does_not_count(make_captioner, pair):
    result = make_captioner({"shortest_edge": 40})(pair, **SHORT)
    ids = np.asarray(result["mask"])
    assert ids[20, 25] != 255 and ids[0, 0] == 255
    assert result["changed_fraction"] == pytest.approx((ids[ids != 255] > 0).mean())


def test_a_rotated_photograph_gets_an_upright_mask(captioner, pair, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for image, name in zip(pair, ("before.png", "after.png"), strict=True):
        image.save(tmp_path / name, exif=exif)
    result = captioner([tmp_path / "before.png", tmp_path / "after.png"], **SHORT)
    assert result["mask"].size == (40, 50)


def test_three_image_tokens_work(make_captioner, pair):
    captioner = make_captioner({"visual_inputs": "bitemporal_change"}, visual_inputs="bitemporal_change")
    assert captioner(pair, **SHORT)["caption"]


def test_a_single_image_is_refused(captioner, pair, tmp_path):
    pair[0].save(tmp_path / "one.png")
    for image in (pair[0], str(tmp_path / "one.png"), [pair[0]]):
        with pytest.raises(ValueError, match="before/after pairs"):
            captioner(image, **SHORT)


def test_saved_it_is_loaded_by_its_folder(captioner, pair, tmp_path):
    captioner.save_pretrained(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert {"model.safetensors", "processor_config.json", "chat_template.jinja", "pipeline_kcfi.py"} <= names
    assert "preprocessor_config.json" not in names
    reloaded = pipeline("change-captioning", model=str(tmp_path), device="cpu")
    assert same(reloaded(pair, **SHORT), captioner(pair, **SHORT))


def test_a_large_pair_is_cut_into_tiles_and_its_regions_are_described(detector, make_pair):
    pair = make_pair(100, 70, square=(64, 8, 92, 30))
    describer = Describer(*load(str(detector)))
    expected = describer.describe(*pair, regions=True)
    captioner = pipeline("change-captioning", model=describer.model, processor=describer.processor)
    for result in (captioner(pair, regions=True), captioner([pair, pair], batch_size=2, regions=True)[1]):
        assert result["caption"] == expected.caption and result["caption_box"] == expected.caption_box
        assert np.array_equal(result["mask"], expected.mask) and result["mask"].size == (100, 70)
        assert result["regions"] == [vars(region) for region in expected.regions] and expected.regions
