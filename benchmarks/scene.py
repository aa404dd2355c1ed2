"""A large scene: detect first and describe what changed, region by region, against a sentence for every tile.

```
python benchmarks/scene.py
python benchmarks/scene.py --speed plain exact bf16 --cases kcfi-tiny --sides 4096 --repeats 1
```

The scene is put together from drawn places, of which one in nine changes (768 px) or one in sixteen (1024 px). Masks
must be the same. Two models: kcfi-tiny, whose language model is tiny; and its tower, perceiver and head, with their
weights, in front of a language model of SmolLM2-135M's size with random weights, which writes 12 tokens per sentence.

`--speed` compares `kcfi scene`, from files to report, in these ways with each other instead, as `speed.py` does with
folders. A sentence counts as the same if it was said of the same square of 256 px, the side of a drawn place.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import rasterio
import torch
from flops import matmul_peak
from measure import Row, comparison, machine, options_of, report, take_turns, warm_up
from PIL import Image
from speed import WAYS, start_all, table

import kcfi
from kcfi.models import load
from kcfi.processing import Describer, describer_kcfi
from kcfi.processing.describer_kcfi import Pair, blend, tile_boxes
from kcfi.scenes import describe_scene
from kcfi.training.synthetic.dataset import SyntheticDataset

BAR = 5.0
PLACE = 256  # px: side of a drawn place
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
    for number in range((side // PLACE) ** 2):
        example = pairs[number % 20 * 2 + (number % 20 == 4)]
        row, column = divmod(number, side // PLACE)
        before.paste(example["image_before"], (column * PLACE, row * PLACE))
        after.paste(example["image_after"], (column * PLACE, row * PLACE))
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


def sentences_by_square(describer: Describer, dates: Sequence[Path], output: Path) -> dict[str, str]:
    """`kcfi scene` into a folder that it does not go on in: what it says of each square that has a change."""
    shutil.rmtree(output, ignore_errors=True)
    said: dict[str, list[str]] = {}
    for change in describe_scene(dates, output, describer).changes:
        left, top, right, bottom = change.box
        square = f"{(left + right) // 2 // PLACE}, {(top + bottom) // 2 // PLACE}"
        said.setdefault(square, []).append(change.caption)
    return {square: "; ".join(sorted(captions)) for square, captions in said.items()}


def read_mask(output: Path) -> np.ndarray:
    """The mask of a report: class ids (H, W)."""
    with rasterio.open(output / "mask.tif") as file:
        mask: np.ndarray = file.read(1)
    return mask


def compare_ways(describer: Describer, side: int, ways: Sequence[str], repeats: int) -> str:
    """What each way costs and changes for a scene of side x side px, as Markdown; ways take turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        describers, starts = start_all(ways, describer.model, describer.processor, describer.view, folder / "kept")
        dates = [folder / "before.tif", folder / "after.tif"]
        for path, image in zip(dates, draw_scene(side), strict=True):
            image.save(path)
        clock: dict[str, list[float]] = {way: [] for way in ways}
        cpu: dict[str, list[float]] = {way: [] for way in ways}
        sentences = {}
        for _ in range(repeats):
            for way, each in describers.items():
                before, worked = time.perf_counter(), time.process_time()
                sentences[way] = sentences_by_square(each, dates, folder / way)
                clock[way].append(time.perf_counter() - before)
                cpu[way].append(time.process_time() - worked)
        masks = {way: read_mask(folder / way) for way in ways}
    tiles = len(tile_boxes(side, side, describer.view))
    return table(clock, cpu, starts, sentences, masks, "tile", tiles)


def compare_sides(case: str, describer: Describer, side: int, repeats: int) -> Row:
    """Square kilometres per hour, at 0.5 m per pixel, of a sentence for every tile and of what changed."""
    scene = draw_scene(side)
    sides = {
        "plain": lambda: plain(describer, scene),
        "ours": lambda: describer.describe(*scene, regions=True).mask,
    }
    masks, operations = warm_up(sides)
    assert np.array_equal(masks["plain"], masks["ours"]), "the masks differ"
    rounds = take_turns(sides, repeats)
    area = (side * 0.5 / 1000) ** 2 * 3600
    title, equal = f"{case}, {side} x {side} px", "the same mask"
    return comparison(title, rounds, area, "km2/h", BAR, equal, operations, matmul_peak())


def main() -> None:
    """Print a row for every model and size, or a table of ways."""
    parser = options_of(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="models (all)")
    parser.add_argument("--sides", type=int, nargs="+", default=[768, 1024], help="of the scenes, in px (%(default)s)")
    parser.add_argument(
        "--speed", nargs="+", choices=WAYS, help="compare these ways of `kcfi scene`, plain among them"
    )
    options = parser.parse_args()
    if options.speed and ("plain" not in options.speed or options.json):
        parser.error("--speed prints a table of differences to plain: name plain too, and leave --json out.")
    rows = []
    for case in options.cases:
        describer = build_describer(case)
        for side in options.sides:
            if options.speed:
                about = machine()
                print(
                    f"{case}, {side} px; {about['threads']} threads of {about['cpu']}, load {about['load']}",
                    flush=True,
                )
                print(compare_ways(describer, side, options.speed, options.repeats), flush=True)
            else:
                rows.append(compare_sides(case, describer, side, options.repeats))
    if not options.speed:
        report("scene", rows, options.json)


if __name__ == "__main__":
    main()
