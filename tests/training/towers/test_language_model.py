"""The small language model: its tokenizer, the sketches it learns from, and a trial of the pretraining command."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from kcfi.processing import KCFIProcessor
from kcfi.training.sharing.model_card import license_of
from kcfi.training.synthetic.dataset import Change, ObjectChange, SyntheticDataset
from kcfi.training.towers.language_model import WORDS, Sketches, SketchReader, build_tokenizer, collate, main, sketch


@pytest.fixture(scope="module")
def processor():
    scenes = SyntheticDataset(40)
    return KCFIProcessor.from_towers(build_tokenizer([c for i in range(40) for c in scenes.truth(i)[2]]))


def test_any_text_survives_the_tokenizer_and_sketch_words_are_single_tokens(processor):
    text = "Ein Haus, 10 m² groß, at the Top-Left!"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text
    assert all(len(processor.tokenizer(word)["input_ids"]) == 1 for word in WORDS)
    assert processor.end_token == "<|im_end|>"


def test_sketch_places_each_object_in_its_patches_once():
    mask = np.zeros((64, 64), np.uint8)
    mask[0:16, 0:16] = 255  # a villa that fills the first patch of a 4 x 4 grid
    mask[40:56, :] = 128  # a road across the third and fourth row
    change = Change((ObjectChange("road", 1, "bottom"), ObjectChange("villa", 1, "top left corner", "new road")))
    words = sketch(mask, change, 4)
    assert words[0] == ["<row 0>", "<column 0>", "<villa>", "<built>", "<new road side>", "<one object>"]
    assert all("<same>" in words[patch] for patch in range(1, 8))
    assert all("<road>" in words[patch] for patch in range(8, 16))
    assert sum("<one object>" in patch for patch in words) == 2


def test_sketch_of_an_unchanged_scene_says_the_same_everywhere():
    words = sketch(np.zeros((64, 64), np.uint8), Change(()), 8)
    assert len(words) == 64 and all(patch[2:] == ["<same>"] for patch in words)


def test_reader_puts_the_mean_of_a_patch_s_words_where_the_image_token_stands(processor):
    samples = [Sketches(SyntheticDataset(4), processor, (8,))[index] for index in (0, 1)]
    batch = collate(samples)
    assert batch["patches"].shape == (2, 64, 8)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    reader = SketchReader(Qwen2ForCausalLM(config), processor.image_token_id).eval()
    table = reader.language_model.get_input_embeddings().weight
    ids = batch["patches"][1, 5]
    torch.testing.assert_close(reader.embed(batch["patches"])[1, 5], table[ids[ids >= 0]].mean(0))
    loss = reader(**batch).loss
    # by hand: the sample alone, its caption tokens only
    losses = []
    for row, sample in enumerate(samples):
        tokens = torch.tensor([*sample["prompt"], *sample["caption"]])
        at = sample["prompt"].index(processor.image_token_id)
        features = reader.embed(batch["patches"][row : row + 1])[0]
        inputs = torch.cat([table[tokens[:at]], features, table[tokens[at + 1 :]]])[None]
        logits = reader.language_model(inputs_embeds=inputs).logits[0, -len(sample["caption"]) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(sample["caption"]), reduction="none"))
    torch.testing.assert_close(loss, torch.cat(losses).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["0", "2"])
def test_pretraining_command_writes_a_language_model_that_loads(tmp_path, steps):
    main(["--output", str(tmp_path), "--steps", steps])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer("<row 3>")["input_ids"] == [tokenizer.convert_tokens_to_ids("<row 3>")]
    assert license_of(str(tmp_path)) == "apache-2.0"
