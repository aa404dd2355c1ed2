"""The plain baseline of change captioning: always say "the scene is the same as before ." on synthetic test pairs.

```
python benchmarks/constant_sentence.py [--num_pairs 500]
```
"""

import argparse
import json

from kcfi.training.metrics import caption_scores
from kcfi.training.synthetic import SyntheticDataset


def main() -> None:
    """Score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_pairs", type=int, default=500)
    count = parser.parse_args().num_pairs
    pairs = SyntheticDataset(count, split="test")
    references = [pairs.truth(index)[2] for index in range(count)]
    changed = [index % 2 == 1 for index in range(count)]
    print(json.dumps(caption_scores(["the scene is the same as before ."] * count, references, changed), indent=2))


if __name__ == "__main__":
    main()
