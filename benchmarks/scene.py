"""A large scene: detect first and describe what changed, region by region, against a sentence for every tile.

```
python benchmarks/scene.py
```

The scene is put together from drawn places, of which one in twenty to one in nine changes. Masks must be the same.
"""

from collections.abc import Iterator

import numpy as np
import torch
from measure import comparison, options_of, peak_memory, print_peak, report, take_turns
from PIL import Image

import kcfi
from kcfi.captioning import Describer, Pair, blend, load, tile_boxes
from kcfi.training.synthetic import SyntheticDataset

BAR = 5.0


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
    boxes = tile_boxes(*scene[0].size, describer.tile)

    def maps() -> Iterator[torch.Tensor]:
        for batch, features in describer._tiles(*scene, boxes, "tiles"):
            describer._sentences(features)
            yield from describer._maps(features, [(describer.tile, describer.tile)] * len(batch))

    with torch.no_grad():
        channels = 1 + describer.model.config.num_change_classes
        scores = blend(maps(), boxes, (channels, scene[0].height, scene[0].width))
    return scores[1:].argmax(0).numpy()


def main() -> None:
    """Print square kilometres per hour, at 0.5 m per pixel, of both sides."""
    parser = options_of(__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[768, 1280], help="of the scenes, in px (%(default)s)")
    options = parser.parse_args()
    describer, rows = Describer(*load(kcfi.embedded_model())), []
    for side in options.sides:
        scene = draw_scene(side)
        sides = {
            "plain": lambda scene=scene: plain(describer, scene),
            "ours": lambda scene=scene: np.asarray(describer.describe(*scene, regions=True).mask),
        }
        if options.side:
            print_peak(sides[options.side])
            return
        assert np.array_equal(sides["plain"](), sides["ours"]()), "the masks differ"
        area = (side * 0.5 / 1000) ** 2 * 3600
        seconds, peaks = take_turns(sides, options.repeats), peak_memory(__file__, sides, "--sides", str(side))
        rows.append(comparison(f"{side} x {side} px", seconds, area, "km2/h", BAR, "the same mask", peaks))
    report("scene", rows, options.json)


if __name__ == "__main__":
    main()
