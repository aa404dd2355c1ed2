"""An exported run is the same model in bf16, without copies of the code."""

import json

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from kcfi.training.export import main
from kcfi.training.lora import add_lora, merge_lora, save_start
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
