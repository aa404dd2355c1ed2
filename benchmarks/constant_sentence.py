"""The plain baseline of change captioning: always say "the scene is the same as before .".

```
python benchmarks/constant_sentence.py                                     # of 500 synthetic test pairs
python benchmarks/constant_sentence.py --references LevirCCcaptions.json   # of the split "test" of a captions file
```
"""

import argparse
import json
from pathlib import Path

from kcfi.training.data.levir_cc import read_captions
from kcfi.training.scoring.metrics import caption_scores
from kcfi.training.synthetic.dataset import SyntheticDataset


def main() -> None:
    """Score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_pairs", type=int, default=500, help="synthetic pairs (%(default)s)")
    parser.add_argument(
        "--references", type=Path, help="LevirCCcaptions.json or .json.gz, in place of synthetic pairs"
    )
    options = parser.parse_args()
    if options.references:
        pairs = read_captions(options.references, "test")
        references, changed = [pair.captions for pair in pairs], [pair.changed for pair in pairs]
    else:
        drawn = SyntheticDataset(options.num_pairs, split="test")
        references = [drawn.truth(index)[2] for index in range(options.num_pairs)]
        changed = [index % 2 == 1 for index in range(options.num_pairs)]
    scores = caption_scores(["the scene is the same as before ."] * len(references), references, changed)
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
