import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature

from kcfi import KCFIConfig
from kcfi.processing import INSTRUCTIONS, InputError, KCFIProcessor

VISUAL_INPUTS = {"change": 1, "bitemporal": 2, "bitemporal_change": 3}


@pytest.fixture
def make_processor(make_tokenizer):
    def make(dialect="chatml", **settings):
        return KCFIProcessor.from_towers(make_tokenizer(dialect), **{"image_size": 32, "patch_size": 8, **settings})

    return make


def conversation(*, images=2, system=None, answer=None):
    """A user turn with image entries before and behind its text."""
    content = [{"type": "image"}] * (images // 2) + [{"type": "text", "text": "What changed?"}]
    content += [{"type": "image"}] * (images - images // 2)
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": content}]
    return turns + ([{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else [])


class TestPrompts:
    def test_instructions_are_the_five_of_table_1(self):
        assert len(set(INSTRUCTIONS)) == 5
        assert all("<image>" not in sentence and "geographic target" in sentence for sentence in INSTRUCTIONS)

    @pytest.mark.parametrize(("visual_inputs", "count"), VISUAL_INPUTS.items())
    def test_chatml_prompt(self, make_processor, visual_inputs, count):
        processor = make_processor("chatml", visual_inputs=visual_inputs)
        prompt = f"<|im_start|>user\n{'<image>' * count}What changed?<|im_end|>\n<|im_start|>assistant\n"
        assert processor.prompt("What changed?") == prompt
        assert processor.prompt("What changed?", caption="a house .") == prompt + "a house .<|im_end|>"

    @pytest.mark.parametrize(("visual_inputs", "count"), VISUAL_INPUTS.items())
    def test_plain_prompt(self, make_processor, visual_inputs, count):
        processor = make_processor("plain", visual_inputs=visual_inputs)
        prompt = f"{'<image>' * count}What changed?\n"
        assert processor.prompt("What changed?") == prompt
        assert processor.prompt("What changed?", caption="a house .") == prompt + "a house .</s>"

    @pytest.mark.parametrize("dialect", ["chatml", "plain"])
    @pytest.mark.parametrize("instruction", INSTRUCTIONS)
    def test_token_ids_of_prompt_and_caption_are_those_of_the_whole(self, make_processor, pair, dialect, instruction):
        processor = make_processor(dialect)
        caption = "a house appears next to the road ."
        prompt_ids, caption_ids = processor.encode_prompt(instruction), processor.encode_caption(caption)
        for text, ids in (
            (processor.prompt(instruction), prompt_ids),
            (processor.prompt(instruction, caption), prompt_ids + caption_ids),
        ):
            assert processor(images=[pair], text=[text])["input_ids"] == [ids]
        assert caption_ids[-1] in processor.generation_tokens["eos_token_id"]
        assert processor.tokenizer.decode(caption_ids) == caption + processor.end_token

    @pytest.mark.parametrize("dialect", ["chatml", "plain"])
    def test_training_text_is_the_conversation_with_its_answer(self, make_processor, dialect):
        processor = make_processor(dialect)
        for images in (2, 4):
            turns = conversation(images=images, answer="a house .")
            text = processor.prompt("What changed?", "a house .")
            expected = text.replace("<image>", "<image>" * (images // 2))
            assert processor.apply_chat_template(turns) == expected

    @pytest.mark.parametrize(("visual_inputs", "count"), VISUAL_INPUTS.items())
    def test_two_image_entries_print_the_tokens_of_visual_inputs(self, make_processor, visual_inputs, count):
        processor = make_processor(visual_inputs=visual_inputs)
        assert processor.apply_chat_template(conversation()).count("<image>") == count
        assert processor.apply_chat_template(conversation(images=0)).count("<image>") == 0
        with pytest.raises(Exception, match="A before/after pair needs two image entries, this message has 1"):
            processor.apply_chat_template(conversation(images=1))

    def test_a_system_turn_is_there_only_when_asked_for(self, make_processor):
        turns = conversation(system="Be brief.")
        chatml, plain = make_processor("chatml"), make_processor("plain")
        assert chatml.apply_chat_template(turns).startswith(
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        )
        assert plain.apply_chat_template(turns) == "Be brief.\n<image>What changed?\n"
        assert "system" not in chatml.prompt()

    @pytest.mark.parametrize("dialect", ["chatml", "plain"])
    def test_the_answer_and_its_end_are_what_the_assistant_mask_marks(self, make_processor, pair, dialect):
        processor = make_processor(dialect)
        turns = conversation(answer="a house .")
        turns[0]["content"][0] = {"type": "image", "image": pair[0]}
        turns[0]["content"][2] = {"type": "image", "image": pair[1]}
        inputs = processor.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        marked = inputs["input_ids"][inputs["assistant_masks"].bool()]
        assert marked.tolist() == processor.encode_caption("a house .")
        assert inputs["pixel_values"].shape == (1, 2, 3, 32, 32)


class TestCall:
    @pytest.mark.parametrize(("visual_inputs", "count"), VISUAL_INPUTS.items())
    def test_placeholders_are_as_many_as_the_model_has_features(self, make_processor, pair, visual_inputs, count):
        processor = make_processor(visual_inputs=visual_inputs)
        config = KCFIConfig(
            vision_config={"model_type": "vit", "image_size": 32, "patch_size": 8}, visual_inputs=visual_inputs
        )
        inputs = processor(images=[pair, pair], text=[processor.prompt()] * 2, return_tensors="pt")
        placeholders = (inputs["input_ids"] == processor.image_token_id).sum(dim=1)
        assert placeholders.tolist() == [config.num_image_tokens * config.num_patches] * 2 == [count * 16] * 2
        assert inputs["pixel_values"].shape == (2, 2, 3, 32, 32)
        sizes = processor._get_num_multimodal_tokens(image_sizes=[(40, 50), (7, 9)])
        assert sizes["num_image_tokens"] == placeholders.tolist()

    def test_a_pair_is_one_item_of_an_inference_server(self, make_processor, pair):
        """vLLM gives the items and as many `<image>` tokens, and asks what became of each token."""
        processor, item = make_processor(), np.stack([np.asarray(image) for image in pair])
        inputs = processor(
            images=[item] * 3, text="<image>" * 3, return_text_replacement_offsets=True, return_tensors="pt"
        )
        (replacements,) = inputs["text_replacement_offsets"]
        assert [(one["type"], one["replacement"]) for one in replacements] == [("image", "<image>" * 16)] * 3
        patches = processor._get_num_multimodal_tokens(image_sizes=[item.shape[1:3]] * 3)["num_image_patches"]
        assert sum(patches) == len(inputs["pixel_values"]) == 3

    def test_placeholders_follow_a_size_given_in_the_call(self, make_processor, pair):
        processor = make_processor()
        inputs = processor(images=[pair], text=[processor.prompt()], size={"height": 64, "width": 16})
        assert inputs["input_ids"][0].count(processor.image_token_id) == 8 * 2

    def test_pairs_may_come_flat_nested_or_stacked(self, make_processor, pair):
        processor = make_processor()
        texts = [processor.prompt()] * 2
        expected = processor(images=[pair, pair[::-1]], text=texts, return_tensors="pt")
        first = np.stack([np.asarray(image) for image in pair])
        stacked = np.stack([first, first[::-1]])
        for images in ([*pair, *pair[::-1]], [[pair], [pair[::-1]]], stacked):
            inputs = processor(images=images, text=texts, return_tensors="pt")
            assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
            assert torch.equal(inputs["input_ids"], expected["input_ids"])

    def test_a_text_may_have_no_pair_or_several(self, make_processor, pair):
        processor = make_processor("plain")
        texts = ["<image> and <image> ?", "no image .", "<image> ."]
        inputs = processor(images=[[*pair, *pair], [], pair], text=texts, padding=True, return_tensors="pt")
        assert inputs["pixel_values"].shape == (3, 2, 3, 32, 32)
        assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [32, 0, 16]
        assert "pixel_values" not in processor(images=[[], []], text=["a", "b"])

    def test_images_alone_are_what_the_image_processor_takes(self, make_processor, pair):
        processor = make_processor()
        assert processor(images=pair, return_tensors="pt")["pixel_values"].shape == (2, 3, 32, 32)
        assert processor(images=[pair], return_tensors="pt")["pixel_values"].shape == (1, 2, 3, 32, 32)

    def test_prompts_are_padded_on_the_left(self, make_processor, pair):
        processor = make_processor("plain")
        texts = [processor.prompt("What ?"), processor.prompt("What changed here ?")]
        inputs = processor(images=[pair, pair], text=texts, padding=True, return_tensors="pt")
        short = processor.encode_prompt("What ?")
        assert inputs["input_ids"][0, -len(short) :].tolist() == short
        assert inputs["attention_mask"].sum(dim=1).tolist() == [len(short), inputs["input_ids"].shape[1]]

    def test_nothing_comes_out_that_the_model_does_not_take(self, make_tokenizer, make_processor, pair):
        tokenizer = make_tokenizer("plain", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
        processor = KCFIProcessor.from_towers(tokenizer, image_size=32, patch_size=8)
        inputs = processor(images=[pair], text=[processor.prompt()])
        assert isinstance(inputs, BatchFeature)
        assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"} == set(processor.model_input_names)

    @pytest.mark.parametrize(
        ("visual_inputs", "text", "found"),
        [
            ("change", "What changed ?", "Found 0 tokens and 1 pairs"),
            ("change", "<image><image> ?", "Found 2 tokens and 1 pairs"),
            ("bitemporal", "<image> ?", "Found 1 tokens and 1 pairs"),
        ],
    )
    def test_another_number_of_image_tokens_is_refused(self, make_processor, pair, visual_inputs, text, found):
        processor = make_processor(visual_inputs=visual_inputs)
        match = f"tokens in the prompts should be the same as the number of .*{visual_inputs}.*{found}"
        with pytest.raises(ValueError, match=match):
            processor(images=[pair], text=[text])

    def test_tokens_without_images_are_refused(self, make_processor):
        with pytest.raises(ValueError, match="Found 1 tokens and 0 pairs"):
            make_processor()(text="<image> ?")

    def test_single_images_are_refused(self, make_processor, pair):
        processor = make_processor()
        for images, counts in (
            (pair[0], r"\[1\]"),
            ([[pair[0]], [pair[1]]], r"\[1, 1\]"),
            ([*pair, pair[0]], r"\[3\]"),
        ):
            with pytest.raises(ValueError, match=f"before/after pairs.*got lists of {counts} images"):
                processor(images=images, text=[processor.prompt()])

    def test_text_that_is_no_text_or_nothing_at_all_is_refused(self, make_processor):
        with pytest.raises(ValueError, match="must be a string or list of strings"):
            make_processor()(text=[["What", "changed"]])
        with pytest.raises(ValueError, match="at least one input"):
            make_processor()()


class TestTokenizer:
    def test_a_missing_image_token_is_added(self, make_tokenizer):
        tokenizer = make_tokenizer("plain")
        size = len(tokenizer)
        processor = KCFIProcessor.from_towers(tokenizer)
        assert (processor.image_token, processor.image_token_id, len(tokenizer)) == ("<image>", size, size + 1)
        assert tokenizer.decode([processor.image_token_id], skip_special_tokens=True) == ""

    @pytest.mark.parametrize(
        ("dialect", "token", "token_id"), [("with_image_token", "<image>", 2), ("with_spare_token", "<unused1>", 1)]
    )
    def test_a_token_that_is_there_is_taken(self, make_processor, make_tokenizer, pair, dialect, token, token_id):
        processor = make_processor(dialect)
        assert (processor.image_token, processor.image_token_id) == (token, token_id)
        assert len(processor.tokenizer) == len(make_tokenizer(dialect))
        inputs = processor(images=[pair], text=[processor.prompt()])
        assert inputs["input_ids"][0].count(token_id) == 16

    def test_the_word_unused_is_no_spare_token(self, make_tokenizer):
        tokenizer = make_tokenizer("plain")
        tokenizer.add_tokens(["unused", "reserved"])
        assert KCFIProcessor.from_towers(tokenizer).image_token == "<image>"

    def test_padding_is_set_only_where_it_is_missing(self, make_processor):
        plain, own = make_processor("plain"), make_processor("chatml")
        assert plain.tokenizer.pad_token == "</s>"
        assert plain.generation_tokens == {"eos_token_id": [1], "pad_token_id": 1}
        assert own.tokenizer.pad_token == "<|im_end|>"

    def test_a_padding_token_of_its_own_is_kept(self, make_tokenizer):
        processor = KCFIProcessor.from_towers(make_tokenizer("with_image_token", pad_token="<pad>"))
        assert processor.generation_tokens == {"eos_token_id": [1], "pad_token_id": 0}

    def test_generation_stops_at_the_end_of_a_turn_and_at_the_end_of_text(self, make_tokenizer):
        processor = KCFIProcessor.from_towers(make_tokenizer("chatml", eos_token="<|endoftext|>"))
        assert processor.end_token == "<|im_end|>"
        assert processor.generation_tokens["eos_token_id"] == [0, 2]

    def test_a_tokenizer_without_an_end_is_refused_where_it_is_needed(self, make_tokenizer):
        processor = KCFIProcessor.from_towers(make_tokenizer("plain", eos_token=None, pad_token="<s>"))
        with pytest.raises(ValueError, match=r"no end token: set `tokenizer\.eos_token`"):
            processor.encode_caption("a house .")

    def test_captions_are_decoded_without_markers(self, make_processor):
        processor = make_processor()
        rows = [processor.encode_caption(" a house ."), processor.encode_caption("a road .")]
        width = max(map(len, rows))
        pad = processor.tokenizer.pad_token_id
        tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        assert processor.post_process_image_text_to_text(tokens) == ["a house .", "a road ."]


class TestSettings:
    def test_from_towers_takes_the_tower_s_statistics_and_geometry(self, make_processor):
        settings = make_processor(image_mean=[0.5] * 3, image_std=[0.25] * 3).image_processor
        assert (settings.image_mean, settings.image_std) == ((0.5,) * 3, (0.25,) * 3)
        assert (dict(settings.size), settings.do_center_crop) == ({"height": 32, "width": 32}, False)
        released = make_processor(image_size=224, patch_size=14, shortest_edge=256)
        assert dict(released.image_processor.size) == {"shortest_edge": 256}
        assert released.image_processor.do_center_crop
        assert released.num_patches == 256

    def test_unknown_visual_inputs_are_refused(self, make_processor):
        with pytest.raises(
            ValueError, match="visual_inputs='after' is not one of change, bitemporal, bitemporal_change"
        ):
            make_processor(visual_inputs="after")

    def test_masks_are_post_processed_by_the_image_processor(self, make_processor):
        processor = make_processor(shortest_edge=40)
        logits = torch.randn(1, 2, 32, 32)
        (mask,) = processor.post_process_masks(logits, [(60, 80)])
        assert torch.equal(mask, processor.image_processor.post_process_masks(logits, [(60, 80)])[0])
        assert mask[30, 40] != 255 and mask[0, 0] == 255

    @pytest.mark.parametrize("dialect", ["chatml", "plain", "with_image_token", "with_spare_token"])
    def test_saved_and_loaded_it_gives_the_same(self, make_processor, pair, tmp_path, dialect):
        processor = make_processor(dialect, visual_inputs="bitemporal", shortest_edge=40)
        processor.save_pretrained(tmp_path)
        reloaded = AutoProcessor.from_pretrained(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == {
            "processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
            "processing_kcfi.py", "image_processing_kcfi.py", "reading_kcfi.py", "pipeline_kcfi.py",
            "describer_kcfi.py", "places_kcfi.py", "calibration_kcfi.py",
        }  # fmt: skip
        assert type(reloaded) is KCFIProcessor
        assert reloaded.to_dict() == processor.to_dict()
        assert reloaded.chat_template == processor.chat_template
        assert reloaded.generation_tokens == processor.generation_tokens
        texts = [processor.prompt(), processor.prompt("What ?")]
        assert texts == [reloaded.prompt(), reloaded.prompt("What ?")]
        expected = processor(images=[pair, pair], text=texts, padding=True, return_tensors="pt")
        inputs = reloaded(images=[pair, pair], text=texts, padding=True, return_tensors="pt")
        assert set(inputs) == set(expected)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
        assert reloaded.encode_caption("a house .") == processor.encode_caption("a house .")

    def test_a_chat_template_of_one_s_own_is_kept(self, make_tokenizer, make_processor, tmp_path):
        processor = make_processor()
        template = "{% for message in messages %}Q: <image> ?{% endfor %}"
        own = KCFIProcessor(processor.image_processor, make_tokenizer("plain"), chat_template=template)
        own.save_pretrained(tmp_path)
        assert AutoProcessor.from_pretrained(tmp_path).prompt() == "Q: <image> ?"


def test_settings_of_reading_reach_images_beside_text(make_processor, tmp_path):
    """The base class opens images before it looks at the arguments of the call."""
    for name in ("a.png", "b.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 4000, (40, 40), dtype=np.uint16)).save(tmp_path / name)
    files, processor = [tmp_path / "a.png", tmp_path / "b.png"], make_processor()
    expected = processor.image_processor([files], stretch=[2, 98], return_tensors="pt")["pixel_values"]
    for settings in ({"stretch": [2, 98]}, {"images_kwargs": {"stretch": [2, 98]}}):
        inputs = processor(images=[files], text=[processor.prompt()], return_tensors="pt", **settings)
        assert torch.equal(inputs["pixel_values"], expected)
    with pytest.raises(ValueError, match="max_image_pixels, 99"):
        processor(images=[files], text=[processor.prompt()], max_image_pixels=99)


def test_a_template_that_cannot_be_used_is_named(make_tokenizer):
    processor = KCFIProcessor.from_towers(make_tokenizer("chatml"))
    processor.chat_template = "{{ nothing.of.this }}"
    with pytest.raises(InputError, match="The chat template saved with this model cannot be used"):
        processor.prompt()
