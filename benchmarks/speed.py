"""What each `--speed` costs and changes: start-up, milliseconds a pair, sentences, mask pixels and building F1.

```
python benchmarks/speed.py PAIRS --split test --num_pairs 56                     # kcfi-tiny
python benchmarks/speed.py PAIRS --num_pairs 8 --towers VISION TEXT --longest 12   # two pretrained towers, joined
```

PAIRS is what `kcfi evaluate --dataset` takes. Folders of 8 pairs are described from files to table rows and pictures,
as by `kcfi caption A B`; the ways take turns, and so does "loop", what a user would write (`caption_folder.plain`).
`scene.py --speed` does the same with a large scene.
Milliseconds are of the clock and of the processor (all threads), medians over folders; the latter say more where
others work on the machine. Differences are to "plain". Of joined towers perceiver, projector and head are random, so
that only times and differences mean something.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import caption_folder
import numpy as np
from measure import machine
from PIL import Image

import kcfi.speed
from kcfi.archives.images import describe_images
from kcfi.archives.job import Job
from kcfi.archives.pairs import find_pairs
from kcfi.models import load
from kcfi.pictures import MASK_BUILDING
from kcfi.processing import Describer, describer_kcfi
from kcfi.speed import speed_up
from kcfi.towers import join_towers
from kcfi.training.load import load_pairs

FOLDER = 8  # pairs
WAYS = ("plain", "exact", "bf16")


def write_folders(root: Path, dataset: str, split: str, count: int) -> list[Path]:
    """The first pairs of a data set as files, `FOLDER` to a folder: A, B and truth."""
    pairs = load_pairs(dataset, split)
    for index in range(min(count, len(pairs))):
        example, folder = pairs[index], root / f"{index // FOLDER:04}"
        for name, key in (("A", "image_before"), ("B", "image_after"), ("truth", "mask")):
            (folder / name).mkdir(parents=True, exist_ok=True)
            example[key].save(folder / name / f"{index:05}.png")
    return sorted(root.iterdir())


def start(way: Any, model: Any, processor: Any, tile: int) -> tuple[Describer, float]:
    """A describer that encodes in a way, and the seconds of the processor until it could."""
    describer, started = Describer(model, processor, tile=tile), time.process_time()
    speed_up(describer, way, 1)
    return describer, time.process_time() - started


def start_all(
    ways: Sequence[str], model: Any, processor: Any, tile: int, kept: Path
) -> tuple[dict[str, Describer], dict[str, tuple[float, float]]]:
    """Describers by way, and seconds of the processor until each is ready: the first time on a machine, and later.

    Args:
        ways: of `WAYS`.
        model: of all describers.
        processor: of all describers.
        tile: px, of all describers.
        kept: empty folder for what is exported, so that the first start is one.
    """
    kcfi.speed.KEPT = kept
    describers, starts = {}, {}
    for way in ways:
        first = start(way, model, processor, tile)[1]
        if way == "bf16" and "exact" in starts:  # the same files
            first += starts["exact"][0] - starts["exact"][1]
        describers[way], later = start(way, model, processor, tile)
        starts[way] = (max(first, later), later)
    return describers, starts


def describe(folder: Path, describer: Describer, way: str) -> dict[str, str]:
    """Sentences by name; masks and overlays lie in FOLDER/WAY."""
    (folder / way).mkdir(exist_ok=True)
    rows = find_pairs(folder / "A", folder / "B").to_pylist()
    results = describe_images(rows, describer, Job({}), folder / way)
    return {row["name"]: result["caption"] for row, result in zip(rows, results, strict=True)}


def read_masks(folder: Path, way: str) -> np.ndarray:
    """Mask files of a way, or of "truth", in the order of the names: grey values (pairs, H, W)."""
    end = "" if way == "truth" else "_mask"
    return np.stack(
        [np.asarray(Image.open(folder / way / f"{path.stem}{end}.png")) for path in sorted((folder / "A").iterdir())]
    )


def f1(marked: np.ndarray, true: np.ndarray) -> float:
    """F1 of the building pixels, x 100."""
    marked, true = marked == MASK_BUILDING, true == MASK_BUILDING
    return 200 * float((marked & true).sum()) / max(1, int(marked.sum() + true.sum()))


def table(
    clock: dict[str, list[float]],
    cpu: dict[str, list[float]],
    starts: dict[str, tuple[float, float]],
    sentences: dict[str, dict[str, str]],
    masks: dict[str, np.ndarray],
    unit: str = "pair",
    size: int = FOLDER,
) -> str:
    """All ways as Markdown.

    Args:
        clock: seconds of every folder or round, by way.
        cpu: the same of the processor.
        starts: seconds of the processor until a way is ready, the first time on a machine and later.
        sentences: by way and name.
        masks: by way, and "truth" where it is known.
        unit: of the work.
        size: units of a folder or round.
    """
    heads = ["way", "start, first / later", f"ms a {unit}, clock", f"ms a {unit}, processor", "times plain (clock)"]
    heads += [f"pays after {unit}s, first / later", "other sentences", "other mask pixels", "building F1"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    per_unit = {way: 1000 * statistics.median(taken) / size for way, taken in cpu.items()}
    for way in clock:
        ratio = statistics.median(one / other for one, other in zip(clock["plain"], clock[way], strict=True))
        first = f"| {way} | {' / '.join(f'{value:.1f} s' for value in starts[way]) if way in starts else '-'} "
        first += f"| {1000 * statistics.median(clock[way]) / size:.0f} | {per_unit[way]:.0f} | {ratio:.2f} "
        saved = (per_unit["plain"] - per_unit[way]) / 1000
        pays = (
            " / ".join(f"{math.ceil(value / saved)}" for value in starts[way]) if way in starts and saved > 0 else "-"
        )
        if way == "loop":
            lines.append(f"{first}| - | - | - | - |")
            continue
        names = sentences["plain"].keys() | sentences[way].keys()
        other = sum(sentences["plain"].get(name) != sentences[way].get(name) for name in names)
        pixels = int((masks[way] != masks["plain"]).sum())
        quality = f"{f1(masks[way], masks['truth']):.1f}" if "truth" in masks else "-"
        lines.append(
            f"{first}| {pays} | {other} of {len(names)} | {pixels} of {masks['plain'].size} "
            f"({pixels / masks['plain'].size:.4%}) | {quality} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, folder by folder, so that a stopped run has one too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", metavar="PAIRS", help="data set with building masks")
    parser.add_argument("--split", default="test", help="of it (%(default)s)")
    parser.add_argument("--num_pairs", type=int, default=56, help="the first so many (%(default)s)")
    parser.add_argument("--model", default="kcfi-tiny", help="folder or Hub id (%(default)s)")
    parser.add_argument("--towers", nargs=2, metavar=("VISION", "TEXT"), help="joined in place of --model")
    parser.add_argument(
        "--longest", type=int, default=describer_kcfi.LONGEST, help="tokens of a sentence (%(default)s)"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="beside the loop (all)")
    options = parser.parse_args()
    describer_kcfi.LONGEST = options.longest
    if options.towers:
        model, processor = join_towers(*options.towers, image_size=252, visual_token_pooling=2, num_change_classes=3)
    else:
        model, processor = load(options.model, "cpu")
    with tempfile.TemporaryDirectory() as name:
        folders = write_folders(Path(name) / "pairs", options.pairs, options.split, options.num_pairs)
        tile = Image.open(next((folders[0] / "A").iterdir())).width
        describers, starts = start_all(options.ways, model, processor, tile, Path(name) / "kept")
        sides = {
            way: lambda folder, way=way, describer=describer: describe(folder, describer, way)
            for way, describer in describers.items()
        }
        every: dict[str, Callable[[Path], Any]] = {
            "loop": lambda folder: caption_folder.plain(folder, model, processor),
            **sides,
        }
        for side in every.values():
            side(folders[0])  # warm
        clock: dict[str, list[float]] = {way: [] for way in every}
        cpu: dict[str, list[float]] = {way: [] for way in every}
        sentences: dict[str, dict[str, str]] = {way: {} for way in every}
        about = machine()
        print(f"{about['threads']} threads of {about['cpu']}, load {about['load']}", flush=True)
        for number, folder in enumerate(folders, start=1):
            for way, side in every.items():
                before, worked = time.perf_counter(), time.process_time()
                sentences[way] |= side(folder)
                clock[way].append(time.perf_counter() - before)
                cpu[way].append(time.process_time() - worked)
            done = folders[:number]
            masks = {way: np.concatenate([read_masks(each, way) for each in done]) for way in ("truth", *sides)}
            print(table(clock, cpu, starts, sentences, masks), flush=True)


if __name__ == "__main__":
    main()
