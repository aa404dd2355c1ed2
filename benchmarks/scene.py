"""A large scene: detect first and describe what changed, region by region, against a sentence for every tile.

```
python benchmarks/scene.py
```

The scene is put together from drawn places, of which one in nine changes (768 px) or one in sixteen (1024 px). Masks
must be the same. Two models: kcfi-tiny, whose language model is tiny; and its tower, perceiver and head, with their
weights, in front of a language model of SmolLM2-135M's size with random weights, which writes 12 tokens per sentence.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from flops import matmul_peak
from measure import comparison, loaded_memory, options_of, report, take_turns, warm_up
from PIL import Image

import kcfi
from kcfi.models import load
from kcfi.processing import Describer, describer_kcfi
from kcfi.processing.describer_kcfi import Pair, blend, tile_boxes
from kcfi.training.synthetic.dataset import SyntheticDataset

BAR = 5.0
CASES = ["kcfi-tiny", "kcfi-tiny-smollm2-135m"]
LONGEST = describer_kcfi.LONGEST
WORDS = 12  # tokens of a sentence of LEVIR-CC, on average, with its end


def build_describer(case: str) -> Describer:
    """The describer of a case; with the large language model every sentence has `WORDS` tokens."""
    model, processor = load(kcfi.embedded_model())
    describer_kcfi.LONGEST = LONGEST if case == "kcfi-tiny" else WORDS
    if case == "kcfi-tiny":
        return Describer(model, processor)
    configs = Path(kcfi.embedded_model()).parent
    config = kcfi.KCFIConfig.from_pretrained(configs / "kcfi-tiny")
    config.text_config = kcfi.KCFIConfig.from_pretrained(configs / "kcfi-dinov2s-smollm2-135m").text_config
    torch.manual_seed(0)
    large = kcfi.KCFIForConditionalGeneration(config).eval()
    for name in ("vision_tower", "key_change_perceiver", "change_detection_head"):
        setattr(large.model, name, getattr(model.model, name))
    large.generation_config.min_new_tokens = WORDS
    return Describer(large, processor)


def draw_scene(side: int) -> Pair:
    """Two dates of side x side px: drawn places beside each other; the fifth of every twenty is a changed one."""
    pairs = SyntheticDataset(40, seed=7)  # every second one is changed
    before, after = Image.new("RGB", (side, side)), Image.new("RGB", (side, side))
    for number in range((side // 256) ** 2):
        example = pairs[number % 20 * 2 + (number % 20 == 4)]
        place = (number % (side // 256) * 256, number // (side // 256) * 256)
        before.paste(example["image_before"], place)
        after.paste(example["image_after"], place)
    return before, after


def plain(describer: Describer, scene: Pair) -> np.ndarray:
    """The mask, and on the way a sentence for every tile, which is encoded once."""
    boxes = tile_boxes(*scene[0].size, describer.view)

    def maps() -> Iterator[torch.Tensor]:
        for first in range(0, len(boxes), describer.batch_size):
            views = [tuple(image.crop(box) for image in scene) for box in boxes[first : first + describer.batch_size]]
            features = describer._compare(*describer._stages(views))
            describer._write(features)
            yield from describer._maps(features)

    with torch.no_grad():
        channels = 1 + describer.model.config.num_change_classes
        scores = blend(maps(), boxes, (channels, scene[0].height, scene[0].width))
    return scores[1:].argmax(0).numpy()


def main() -> None:
    """Print square kilometres per hour, at 0.5 m per pixel, of both sides."""
    parser = options_of(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="models (all)")
    parser.add_argument("--sides", type=int, nargs="+", default=[768, 1024], help="of the scenes, in px (%(default)s)")
    options = parser.parse_args()
    rows = []
    for case in options.cases:
        describer = build_describer(case)
        loaded = loaded_memory()
        for side in options.sides:
            scene = draw_scene(side)
            sides = {
                "plain": lambda describer=describer, scene=scene: plain(describer, scene),
                "ours": lambda describer=describer, scene=scene: describer.describe(*scene, regions=True).mask,
            }
            masks, operations = warm_up(sides)
            assert np.array_equal(masks["plain"], masks["ours"]), "the masks differ"
            rounds = take_turns(sides, options.repeats, loaded)
            area = (side * 0.5 / 1000) ** 2 * 3600
            title, equal = f"{case}, {side} x {side} px", "the same mask"
            rows.append(comparison(title, rounds, area, "km2/h", BAR, equal, operations, matmul_peak()))
    report("scene", rows, options.json)


if __name__ == "__main__":
    main()
