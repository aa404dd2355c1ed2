"""Captions and masks of a folder of pairs: `kcfi caption A B` against the loop that a user would write.

```
python benchmarks/caption_folder.py
```

The plain side opens a pair, prepares it, lets the model write and mask it, and saves mask and overlay, one pair at a
time; it encodes each pair once. Ours does the same in batches. Sentences must be the same. Two models: kcfi-tiny,
whose time goes to the vision tower; and the size of DINOv2-S with SmolLM2-135M, random weights and the vocabulary of
kcfi-tiny, which writes sentences of 12 tokens.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flops import matmul_peak
from measure import comparison, loaded_memory, options_of, report, take_turns, warm_up
from PIL import Image
from train_step import build

from kcfi.archives.images import describe_images
from kcfi.archives.job import Job
from kcfi.archives.pairs import find_pairs
from kcfi.models import load
from kcfi.pictures import overlay
from kcfi.processing import Describer, describer_kcfi
from kcfi.training.synthetic.dataset import SyntheticDataset

BAR = 3.0
LONGEST = describer_kcfi.LONGEST
CASES = ["kcfi-tiny", "kcfi-dinov2s-smollm2-135m"]  # folders of hub_configs


def write_pairs(folder: Path, count: int) -> None:
    """Draw pairs into folder/A and folder/B."""
    pairs = SyntheticDataset(count, seed=6)
    for name in ("A", "B"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        example = pairs[index]
        example["image_before"].save(folder / "A" / f"{index:03}.png")
        example["image_after"].save(folder / "B" / f"{index:03}.png")


def plain(folder: Path, model: Any, processor: Any) -> dict[str, str]:
    """One pair at a time; returns the sentences by name."""
    sentences = {}
    output = folder / "plain"
    output.mkdir(exist_ok=True)
    for path in sorted((folder / "A").iterdir()):
        pair = [Image.open(path), Image.open(folder / "B" / path.name)]
        inputs = processor(images=[pair], text=[processor.prompt()], return_tensors="pt")
        with torch.no_grad():
            features = model.get_image_features(pixel_values=inputs.pop("pixel_values"))
            tokens = model.generate(
                **inputs,
                mm_encoder_outputs={"image": features},
                max_new_tokens=describer_kcfi.LONGEST,
                do_sample=False,
                **processor.generation_tokens,
            )
        [text] = processor.post_process_image_text_to_text(tokens[:, inputs["input_ids"].shape[1] :])
        sentences[path.stem] = " ".join(text.split())
        [mask] = processor.post_process_masks(features.mask_logits, [(pair[0].height, pair[0].width)])
        Image.fromarray(mask.numpy().astype(np.uint8)).save(output / f"{path.stem}_mask.png")
        overlay(pair[1], mask.numpy()).save(output / f"{path.stem}_overlay.png")
    return sentences


def ours(folder: Path, describer: Describer) -> dict[str, str]:
    """The list of pairs as a block of `kcfi caption`; returns the sentences by name."""
    output = folder / "ours"
    output.mkdir(exist_ok=True)
    rows = find_pairs(folder / "A", folder / "B").to_pylist()
    results = describe_images(rows, describer, Job({"model": "kcfi-tiny"}), output)
    return {row["name"]: result["caption"] for row, result in zip(rows, results, strict=True)}


def make_sides(folder: Path, model: Any, processor: Any) -> dict[str, Callable[[], dict[str, str]]]:
    """Both sides for the pairs of a folder."""
    describer = Describer(model, processor, tile=256)  # the side of the pairs: each is one tile
    return {"plain": lambda: plain(folder, model, processor), "ours": lambda: ours(folder, describer)}


def build_reader(case: str) -> tuple[Any, Any]:
    """Model in evaluation mode and processor of a case."""
    describer_kcfi.LONGEST = LONGEST if case == "kcfi-tiny" else 12
    if case == "kcfi-tiny":
        return load(case)
    model, processor = build(case, words=True)
    return model.eval(), processor


def main() -> None:
    """Print pairs per second of both sides."""
    parser = options_of(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="models (all)")
    parser.add_argument("--pairs", type=int, nargs="+", default=[4, 8], help="pairs of a folder (%(default)s)")
    options = parser.parse_args()
    rows = []
    for case in options.cases:
        model, processor = build_reader(case)
        loaded = loaded_memory()
        for count in options.pairs:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                write_pairs(folder, count)
                sides = make_sides(folder, model, processor)
                sentences, operations = warm_up(sides)
                assert sentences["plain"] == sentences["ours"], "the sentences differ"
                rounds = take_turns(sides, options.repeats, loaded)
            title, equal = f"{case}, {count} pairs", "the same sentences"
            rows.append(comparison(title, rounds, count, "pairs/s", BAR, equal, operations, matmul_peak()))
    report("caption_folder", rows, options.json)


if __name__ == "__main__":
    main()
