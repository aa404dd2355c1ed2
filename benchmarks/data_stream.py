"""How many synthetic pairs one process draws per second: painted, and as mask and captions alone.

```
python benchmarks/data_stream.py --json
```
"""

import argparse
import json
import os
import time

from kcfi.training.synthetic import SyntheticDataset


def pairs_per_second(count: int, paint: bool) -> float:
    """Draw `count` pairs after a warm-up: with both images, or masks and captions alone."""
    pairs = SyntheticDataset(count + 4, seed=1)
    draw = pairs.__getitem__ if paint else pairs.truth
    for index in range(4):  # textures are cached by the first pairs
        draw(index)
    started = time.perf_counter()
    for index in range(4, count + 4):
        draw(index)
    return count / (time.perf_counter() - started)


def main() -> None:
    """Print two rates: painted pairs, and masks with captions alone (what the language model is pretrained on)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100, help="pairs to draw (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rates = {kind: pairs_per_second(options.pairs, kind == "painted") for kind in ("painted", "truth_only")}
    if options.json:
        print(json.dumps({"pairs_per_second_per_process": rates, "pairs": options.pairs, "cores": os.cpu_count()}))
    else:
        for kind, rate in rates.items():
            print(f"{kind}: {rate:.1f} pairs/s per process")


if __name__ == "__main__":
    main()
