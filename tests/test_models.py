"""Loading a model, and the pictures of what it says."""

import numpy as np
import pytest
import torch

from kcfi.models import load, model_source
from kcfi.pictures import mask_picture
from kcfi.processing import Describer


def test_bf16_is_what_a_model_computes_in_when_asked(detector, make_pair):
    scene = make_pair(64, 64, square=(16, 16, 48, 48))
    exact, (model, processor) = Describer(*load(str(detector))), load(str(detector), dtype="bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    masks = [describer.describe(*scene).mask for describer in (exact, Describer(model, processor))]
    assert (masks[0] == masks[1]).mean() > 0.99 and masks[0].any()


def test_what_is_no_kcfi_model_is_refused_by_its_type(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"Cannot load the model .*: it is a model of type 'bert', not 'kcfi'"):
        load(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not weights"])
def test_broken_weights_are_one_clear_error(make_detector, tmp_path, content):
    make_detector(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="Cannot load the model"):
        load(str(tmp_path))


def test_mask_files_hold_the_values_of_levir_mci():
    mask = np.array([[0, 1], [2, 0]], np.uint8)
    assert np.asarray(mask_picture(mask, 3)).tolist() == [[0, 128], [255, 0]]
    assert np.asarray(mask_picture(mask // 2, 2)).tolist() == [[0, 0], [255, 0]]


def test_a_missing_folder_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "clip").mkdir(parents=True)
    assert model_source("runs/clip") == "runs/clip"
    assert model_source("openai/clip-vit-large-patch14") == "openai/clip-vit-large-patch14"
    with pytest.raises(ValueError, match="No model runs/paper: the folder runs is here and holds no folder paper"):
        model_source("runs/paper")
