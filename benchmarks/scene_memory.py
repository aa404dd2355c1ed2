"""Memory and time of `kcfi scene` against the area of a scene, beside `kcfi caption`.

```
python benchmarks/scene_memory.py                                       # three sizes, with kcfi-tiny
python benchmarks/scene_memory.py --stand_in --sides 5000 10000 20000   # all but the model's part
python benchmarks/scene_memory.py --stand_in --sides 5000 10000 --dates 3
```

The pairs are GeoTIFFs of 0.5 m per pixel with a drawn place in one of 64 squares of 256 px, and black between them; a
model takes as long for those. `--stand_in` puts a comparison of grey values in the model's place, which is enough to
see the memory and the time of all else.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import rasterio
import torch
from affine import Affine
from rasterio.windows import Window

from kcfi.models import embedded_model, load
from kcfi.processing import Describer
from kcfi.processing.describer_kcfi import Pair, Told
from kcfi.scenes import describe_scene
from kcfi.training.synthetic.dataset import SyntheticDataset

PLACE = 256  # px: side of a drawn place
EVERY = 8  # squares, across and down, of which one holds a place


def write_pair(folder: Path, side: int) -> list[Path]:
    """Write both dates of a scene of side x side px; all places changed."""
    drawn = SyntheticDataset(20, seed=7)
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "crs": "EPSG:32650", "width": side, "height": side}
    layout = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
    place = {"transform": Affine(0.5, 0, 500_000, 0, -0.5, 4_400_000)}
    paths = []
    for date in ("before", "after"):
        paths.append(folder / f"{date}.tif")
        with rasterio.open(paths[-1], "w", **profile, **layout, **place) as file:
            starts = range(0, side - PLACE + 1, PLACE * EVERY)
            for number, (top, left) in enumerate((top, left) for top in starts for left in starts):
                pixels = np.asarray(drawn[number % 10 * 2 + 1][f"image_{date}"]).transpose(2, 0, 1)
                file.write(pixels, window=Window(left, top, PLACE, PLACE))
    return paths


class StandIn(Describer):
    """A describer that compares grey values, and says the same of everything."""

    def tile_maps(self, parts: Sequence[Pair]) -> Iterator[torch.Tensor]:
        """Buildings where the images differ much."""
        for before, after in parts:
            first, second = (np.asarray(image.convert("L"), np.float32) for image in (before, after))
            changed = torch.from_numpy(np.abs(second - first))
            yield torch.stack([torch.zeros_like(changed), torch.full_like(changed, 60), changed * 0, changed])

    def tell(self, told: Sequence[Told], *_: Any) -> None:
        """One sentence for all."""
        for each in told:
            each.report.caption = "a building appears ."


def measure(command: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak memory in MiB of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    error = process.stderr.read() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)}: {error}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    """Print a row for every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 1536, 2048], help="px (%(default)s)")
    parser.add_argument("--caption_sides", type=int, nargs="*", default=[], help="px, of `kcfi caption` (none)")
    parser.add_argument("--dates", type=int, default=2, help="of `kcfi scene`, the later ones alike (%(default)s)")
    parser.add_argument("--stand_in", action="store_true", help="leave out the model's part")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--files", nargs="+", metavar="PATH", help=argparse.SUPPRESS)  # of who is measured
    options = parser.parse_args()
    if options.files:
        *dates, output = options.files
        describe_scene(dates, output, StandIn(*load(embedded_model(), "cpu")))
        return
    stand_in = [sys.executable, __file__, "--files"]
    kcfi = [sys.executable, "-m", "kcfi_cli"]
    rows = []
    for name, sides in (("scene", options.sides), ("caption", options.caption_sides)):
        for side in sides:
            with TemporaryDirectory() as folder:
                pair = [str(path) for path in write_pair(Path(folder), side)]
                output = str(Path(folder) / "out")
                dates = pair + pair[1:] * (options.dates - 2) if name == "scene" else pair
                command = [*kcfi, name, *dates, "--output", output, "--device", "cpu"]
                if name == "caption":
                    command += ["--regions", "--max_image_pixels", str(side**2)]
                elif options.stand_in:
                    command = [*stand_in, *dates, output]
                seconds, peak = measure(command)
            row = {"command": name, "side": side, "seconds": seconds, "peak_mib": peak, "px_per_s": side**2 / seconds}
            rows.append(row)
            if not options.json:
                print(
                    f"kcfi {name}, {side} px: {seconds:.0f} s, {peak:.0f} MiB, {row['px_per_s']:.0f} px/s", flush=True
                )
    if options.json:
        print(json.dumps({"benchmark": "scene_memory", "stand_in": options.stand_in, "rows": rows}))


if __name__ == "__main__":
    main()
