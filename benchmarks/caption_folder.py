"""Captions and masks of a folder of pairs: `kcfi caption A B` against the loop that a user would write.

```
python benchmarks/caption_folder.py
```

The plain side opens a pair, prepares it, lets the model write and mask it, and saves the mask, one pair at a time; it
encodes each pair once. Ours reads in other processes (their memory is not counted), batches, and writes a table, a
mask and an overlay. Sentences must be the same.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import comparison, options_of, peak_memory, print_peak, report, take_turns
from PIL import Image

import kcfi
from kcfi.captioning import Describer, load
from kcfi.pair_list import describe_list, find_pairs
from kcfi.training.synthetic import SyntheticDataset

BAR = 3.0


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
                **inputs, mm_encoder_outputs={"image": features}, max_new_tokens=64, **processor.generation_tokens
            )
        [text] = processor.post_process_image_text_to_text(tokens[:, inputs["input_ids"].shape[1] :])
        sentences[path.stem] = text.rstrip()
        [mask] = processor.post_process_masks(features.mask_logits, [(pair[0].height, pair[0].width)])
        Image.fromarray(mask.numpy().astype(np.uint8)).save(output / path.name)
    return sentences


def ours(folder: Path, describer: Describer) -> dict[str, str]:
    """The list of pairs as `kcfi caption` does it; returns the sentences by name."""
    shutil.rmtree(folder / "ours", ignore_errors=True)
    rows = describe_list(describer, find_pairs(folder / "A", folder / "B"), folder / "ours", "kcfi-tiny")
    return {row["name"]: row["caption"] for row in rows}


def main() -> None:
    """Print pairs per second of both sides."""
    parser = options_of(__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[16, 32], help="pairs of a folder (%(default)s)")
    options = parser.parse_args()
    model, processor = load(kcfi.embedded_model())
    rows = []
    for count in options.pairs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_pairs(folder, count)
            describer = Describer(model, processor)
            sides: dict[str, Callable[[], dict[str, str]]] = {
                "plain": lambda folder=folder: plain(folder, model, processor),
                "ours": lambda folder=folder, describer=describer: ours(folder, describer),
            }
            if options.side:
                print_peak(sides[options.side])
                return
            assert sides["plain"]() == sides["ours"](), "the sentences differ"
            row = comparison(f"{count} pairs", take_turns(sides, options.repeats), count, "pairs/s", BAR)
            peaks = [peak_memory(__file__, side, "--pairs", str(count)) for side in sides]
        row["peak_mib"] = [peak for peak in peaks if peak is not None]
        row["equal"] = "the same sentences"
        rows.append(row)
    report("caption_folder", rows, options.json)


if __name__ == "__main__":
    main()
