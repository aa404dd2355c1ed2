"""docs/own_data.md from a source to a fine-tuned model: its files and commands as they stand there, but smaller."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from kcfi_cli import main

rasterio = pytest.importorskip("rasterio", reason="the extra `geo` is not installed")

DOC = (Path(__file__).parents[1] / "docs/own_data.md").read_text(encoding="utf-8")
FILES = re.findall(r"```yaml\n# (\S+)\n(.*?)```", DOC, re.S)
[CODE] = re.findall(r"```python\n(.*?)```", DOC, re.S)
MADE = DOC.partition("\n## 6.")[0]  # section 6 trains on real pairs, by a recipe of tests/test_recipes.py
COMMANDS = re.findall(r"^\$ kcfi (.*)$", MADE, re.M)
SMALLER = {  # what the document says -> what a test has time for
    "--pairs 100": "--pairs 10",
    "--num_pairs 200": "--num_pairs 2 --no-meteor",
    "num_train_pairs: 4000": "num_train_pairs: 8",
    "num_eval_pairs: 100": "num_eval_pairs: 2",
}
DEGREES_PER_METRE = 1 / 111_195  # at the equator, where the town lies


def write_town(root):
    """Three regions side by side, each an image of 160 m with four houses, and the footprints of all."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    features = []
    for number, name in enumerate(["centre_1", "hill_1", "harbour_1"]):
        left, top = 0.001 + number * 0.01, 0.001
        pixels = rng.normal((90, 115, 70), 4, (320, 320, 3)).clip(1, 255).astype(np.uint8)
        for west, north in ((20, 30), (100, 40), (40, 110), (110, 100)):
            east, south = west + 16, north + 12
            pixels[2 * north : 2 * south, 2 * west : 2 * east] = (150, 80, 70)
            corners = [(west, north), (east, north), (east, south), (west, south), (west, north)]
            ring = [(left + x * DEGREES_PER_METRE, top - y * DEGREES_PER_METRE) for x, y in corners]
            features.append({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}})
        size = 0.5 * DEGREES_PER_METRE
        profile = {"driver": "GTiff", "width": 320, "height": 320, "count": 3, "dtype": "uint8", "crs": "EPSG:4326"}
        with rasterio.open(
            root / f"images/{name}.tif",
            "w",
            transform=rasterio.transform.from_origin(left, top, size, size),
            **profile,
        ) as f:
            f.write(pixels.transpose(2, 0, 1))
    (root / "footprints.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def shrink(text):
    for number, smaller in SMALLER.items():
        text = text.replace(number, smaller)
    return text


def test_every_number_that_is_made_smaller_stands_in_the_document():
    assert all(number in DOC for number in SMALLER)
    assert [name for name, _ in FILES] == ["my_town/source.yaml", "my_town.yaml"]
    assert [command.split()[0] for command in COMMANDS] == [
        "data", "data", "train", "train", "evaluate", "evaluate", "caption",
    ]  # fmt: skip


def test_the_document_leads_from_a_source_to_a_fine_tuned_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_town(tmp_path / "my_town")
    for name, text in FILES:
        Path(name).write_text(shrink(text))
    for name in ("before.tif", "after.tif"):
        Image.open("my_town/images/centre_1.tif").convert("RGB").save(name)
    for command in COMMANDS:
        assert main(shlex.split(shrink(command))) == 0, (command, capsys.readouterr().err)
    entries = json.loads(Path("library/materials.json").read_text())["entries"]
    assert {(entry["kind"], entry["split"]) for entry in entries} == {
        (kind, split) for kind in ("villa roof", "tile") for split in ("train", "val", "test")
    }
    assert len(list(Path("pairs/images").glob("*/A/*.png"))) == 10
    assert json.loads(Path("runs/after/results.json").read_text())["dataset"] == "synthetic"
    assert list(Path("runs/my_town/samples").iterdir())

    names: dict[str, Any] = {}
    exec(CODE, names)
    merged, adapted = names["model"], AutoModelForImageTextToText.from_pretrained("runs/my_town_lora")
    pixels = torch.rand(1, 2, 3, 256, 256)
    expected = adapted.get_image_features(pixels).mask_logits
    torch.testing.assert_close(merged.get_image_features(pixels).mask_logits, expected)
    assert merged.state_dict().keys() == names["start"].state_dict().keys() != adapted.state_dict().keys()
    assert list(Path("report").glob("*.png"))
