"""How fast one thread makes batches, against how fast a training step of kcfi-tiny eats them.

```
python benchmarks/data_stream.py
```

Ours reads or draws pairs, chooses captions and instruction, and makes tensors; the plain side is the step, packed,
in bf16, on all threads. A loader process has one thread and shares the cores with the step.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import comparison, options_of, report, take_turns, warm_up
from torch.utils.data import DataLoader
from train_step import build, make_sides

from kcfi.training.collator import KCFICollator
from kcfi.training.data.shards import write_shards
from kcfi.training.load import load_pairs
from kcfi.training.synthetic.dataset import SyntheticDataset, synthesize

PAIRS, BAR = 64, 5.0


def next_batch(loader: Iterator[Any]) -> None:
    """Take a batch with one thread, as a loader process does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    next(loader)
    torch.set_num_threads(threads)


def main() -> None:
    """Print pairs per second of the step and of the loader, for drawn pairs and for parquet shards."""
    parser = options_of(__doc__)
    parser.add_argument("--batch", type=int, default=8, help="pairs (%(default)s)")
    options = parser.parse_args()
    model, processor = build("kcfi-tiny")
    collator = KCFICollator(processor, "road_building", 5)
    step, rows = make_sides(options.batch, model, processor)["ours"], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthesize(folder / "pairs", PAIRS * 5 // 4)  # of which PAIRS are for training
        write_shards(folder / "pairs", folder / "shards")
        sources: dict[str, Any] = {
            "drawn on the fly": SyntheticDataset(PAIRS),
            "parquet shards": load_pairs(str(folder / "shards"), "train"),
        }
        for case, pairs in sources.items():
            loader = iter(DataLoader(pairs, batch_size=options.batch, collate_fn=collator))
            sides = {"plain": lambda: step(True), "ours": lambda loader=loader: next_batch(loader)}
            warm_up(sides)
            rounds = take_turns(sides, min(options.repeats, PAIRS // options.batch - 1))
            rows.append(comparison(case, rounds, options.batch, "pairs/s", BAR))
    report("data_stream", rows, options.json)


if __name__ == "__main__":
    main()
