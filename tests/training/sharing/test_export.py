"""An exported run is the same model in bf16, without copies of the code."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from kcfi.models import merge_lora
from kcfi.training.lora import add_lora, save_start
from kcfi.training.sharing.export import main, save
from tests.training.test_trainer import arguments


def test_exported_folder_loads_to_the_rounded_weights_and_holds_no_code(tmp_path, tmp_path_factory, model, processor):
    saved_model = tmp_path_factory.mktemp("run")
    model.save_pretrained(saved_model)
    processor.save_pretrained(saved_model)
    (tmp_path / "README.md").write_text("card", encoding="utf-8")
    main([str(saved_model), str(tmp_path)])
    before = AutoModelForImageTextToText.from_pretrained(saved_model)
    after = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert after.dtype == torch.bfloat16
    for (name, weight), (_, rounded) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        torch.testing.assert_close(weight.bfloat16(), rounded, msg=name)
    assert AutoProcessor.from_pretrained(tmp_path).prompt() == AutoProcessor.from_pretrained(saved_model).prompt()
    assert not list(tmp_path.glob("*.py"))
    for settings in tmp_path.glob("*.json"):
        assert "auto_map" not in json.dumps(json.loads(settings.read_text(encoding="utf-8")))
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "card"


def test_an_adapter_is_exported_merged(tmp_path, model, processor):
    add_lora(model, {"init_lora_weights": False}, arguments(tmp_path))  # random, so that it does something
    run, output = tmp_path / "run", tmp_path / "exported"
    model.save_pretrained(run)
    save_start(model, run)
    processor.save_pretrained(run)
    main([str(run), str(output)])
    assert not list(output.glob("adapter*"))
    exported = AutoModelForImageTextToText.from_pretrained(output)
    for name, weight in merge_lora(model).state_dict().items():
        torch.testing.assert_close(exported.state_dict()[name], weight.bfloat16(), rtol=0.01, atol=0.002, msg=name)


def save_run(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def assert_same_weights(model, expected):
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name


def test_a_language_model_left_out_is_fetched_at_its_commit(tmp_path, model, processor, hub_text_model):
    run, slim = save_run(tmp_path / "run", model, processor), tmp_path / "slim"
    save(run, slim, "auto", hub_text_model)
    assert not [
        name for name in load_file(slim / "model.safetensors") if "language_model" in name or "lm_head" in name
    ]
    settings = json.loads((slim / "config.json").read_text(encoding="utf-8"))
    assert (settings["text_model"], settings["text_model_revision"]) == hub_text_model

    (tmp_path / "hub" / "models--me--lm" / "refs" / "main").write_text("f" * 40)  # it has moved on
    loaded, report = AutoModelForImageTextToText.from_pretrained(slim, output_loading_info=True)
    assert not report["missing_keys"]
    assert_same_weights(loaded, model.state_dict())
    assert_same_weights(AutoModel.from_pretrained(slim), model.model.state_dict())
    loaded.save_pretrained(tmp_path / "whole")
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").config.text_model is None
    assert_same_weights(AutoModelForImageTextToText.from_pretrained(tmp_path / "whole"), model.state_dict())


def test_a_language_model_left_out_is_not_fetched_from_a_pickle(tmp_path, model, processor, hub_text_model):
    save(save_run(tmp_path / "run", model, processor), tmp_path / "slim", "auto", hub_text_model)
    file = next((tmp_path / "hub").rglob("model.safetensors"))
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    with pytest.raises(OSError, match="me/lm has no weights as safetensors"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "slim")
    with pytest.raises(OSError, match="me/lm has no weights as safetensors"):
        save(tmp_path / "run", tmp_path / "again", "auto", hub_text_model)


def test_a_language_model_left_out_is_fetched_where_kcfi_is_not_installed(tmp_path, model, processor, hub_text_model):
    save(save_run(tmp_path / "run", model, processor), tmp_path / "slim", "auto", hub_text_model)
    lines = [
        "import sys, torch",
        'sys.modules["kcfi"] = None  # import kcfi fails',
        "from transformers import AutoModelForImageTextToText",
        'model = AutoModelForImageTextToText.from_pretrained("slim", trust_remote_code=True)',
        'torch.save(model.state_dict(), "weights.pt")',
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, env=environment, check=True)
    weights = torch.load(tmp_path / "weights.pt")
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("changed", ["layers.0.mlp.up_proj.weight", "embed_tokens.weight"])
def test_a_language_model_that_is_not_the_one_named_is_not_left_out(tmp_path, model, processor, text_model, changed):
    with torch.no_grad():
        model.model.language_model.get_parameter(changed).view(-1)[-1] += 1e-3
    run = save_run(tmp_path / "run", model, processor)
    with pytest.raises(ValueError, match=f"its {changed} is not that of"):
        save(run, tmp_path / "slim", "auto", (str(text_model), None))


def test_a_model_without_its_language_model_is_not_loaded_onto_the_disk(tmp_path, model, processor, text_model):
    run, slim = save_run(tmp_path / "run", model, processor), tmp_path / "slim"
    save(run, slim, "auto", (str(text_model), None))
    places = {"model.language_model": "disk", "": "cpu"}
    with pytest.raises(ValueError, match="leaves out its language model"):
        AutoModelForImageTextToText.from_pretrained(slim, device_map=places, offload_folder=tmp_path / "disk")
