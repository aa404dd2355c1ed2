"""An exported run is the same model in bf16, without copies of the code."""

import json

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from kcfi.training.export import main


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
