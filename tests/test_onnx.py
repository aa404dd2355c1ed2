import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import kcfi
from kcfi.models import load
from kcfi.onnx import Detector, export_detector
from kcfi.processing import Describer
from kcfi_cli import main

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "kcfi" / "example"
TOWER = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
TEXT = {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 9}


def make_model(**settings):
    """A tiny model whose images are larger than its tower's own: position embeddings are interpolated."""
    torch.manual_seed(0)
    config = kcfi.KCFIConfig(
        vision_config={**TOWER, "image_size": 16, "patch_size": 4},
        text_config={**TEXT, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"image_size": 24, "image_token_id": 4, "head_hidden_size": 8, **settings},
    )
    model = kcfi.KCFIForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def assert_file_equals(path, model, pairs, tolerance):
    """In onnxruntime the file gives the mask logits and key changes of `get_image_features`."""
    side, session = model.config.image_size, onnxruntime.InferenceSession(path)
    pixels = torch.randn(pairs, 2, 3, side, side, generator=torch.Generator().manual_seed(pairs))
    with torch.no_grad():
        features = model.get_image_features(pixels)
    norms = features.change_features[..., : model.config.stage_width].norm(dim=-1)
    mask_logits, key_changes = map(torch.from_numpy, session.run(None, {"pixel_values": pixels.numpy()}))
    torch.testing.assert_close(mask_logits, features.mask_logits, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(key_changes.flatten(1), norms, atol=tolerance, rtol=tolerance)
    assert len(mask_logits) == pairs and key_changes.shape[1] == key_changes.shape[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """`detector.onnx` of the embedded model, written by the command."""
    path = tmp_path_factory.mktemp("onnx") / "new" / "detector.onnx"
    assert main(["export", "--output", str(path)]) == 0
    return path


@pytest.mark.parametrize("pairs", [1, 3])
def test_the_embedded_models_file_gives_its_masks(tiny, pairs):
    assert_file_equals(tiny, load("kcfi-tiny")[0], pairs, 1e-4)


def test_the_file_holds_the_weights_of_the_detector_and_no_path_of_this_machine(tiny):
    model = load("kcfi-tiny")[0].model
    parts = [model.vision_tower, model.key_change_perceiver, model.change_detection_head]
    weights = 4 * sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert weights < tiny.stat().st_size < 1.1 * weights < 4 * sum(weight.numel() for weight in model.parameters())
    assert [file.name for file in tiny.parent.iterdir()] == ["detector.onnx"]
    assert b".py" not in tiny.read_bytes()


def test_the_documented_example_without_torch_gives_the_mask_of_kcfi_caption(tiny, monkeypatch, tmp_path):
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "onnxruntime" in code]
    for file in (tiny, EXAMPLE / "before.png", EXAMPLE / "after.png"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "deployment.md", "exec"), names)
    report = Describer(*load("kcfi-tiny")).describe(EXAMPLE / "before.png", EXAMPLE / "after.png")
    assert np.count_nonzero(report.mask) > 1000
    assert np.mean(names["mask"] == report.mask) > 0.999  # logits that are equal to the last bits
    assert not re.search(r"import (torch|transformers|kcfi)", code)


def test_the_benchmark_compares_both(tiny):
    from benchmarks.onnx_detector import measure

    assert all(value > 0 for value in measure(str(tiny), "kcfi-tiny", 1).values())


def test_a_vit_with_interpolated_positions_and_context_is_exported(tmp_path):
    model = make_model(flow_scope="stage_and_global", change_context="bitemporal", num_change_classes=3)
    export_detector(model, tmp_path / "detector.onnx")
    assert not model.training
    assert_file_equals(tmp_path / "detector.onnx", model, 3, 1e-4)


def test_the_detector_is_exported_by_torch():
    detector = Detector(make_model()).eval()
    shapes = ({0: torch.export.Dim("pairs")},)
    program = torch.export.export(detector, (torch.zeros(2, 2, 3, 24, 24),), dynamic_shapes=shapes).module()
    pixels = torch.randn(3, 2, 3, 24, 24)
    for ours, theirs in zip(program(pixels), detector(pixels), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        ({"use_change_detection_head": False}, torch.float32, "no change detection head"),
        ({}, torch.bfloat16, r"in torch.bfloat16: load it with dtype=torch\.float32"),
    ],
)
def test_what_cannot_be_exported_is_refused(settings, dtype, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_detector(make_model(**settings).to(dtype), tmp_path / "new" / "detector.onnx")
    assert not (tmp_path / "new").exists()


def test_a_missing_exporter_is_one_line_with_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kcfi.onnx.find_spec", lambda name: None)
    assert main(["export", "--output", str(tmp_path / "detector.onnx")]) == 2
    assert 'not installed: `pip install "kcfi[onnx]"`' in capsys.readouterr().err
