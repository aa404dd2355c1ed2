"""The order in which training visits the pairs: a pure function of (seed, epoch), shared out among the ranks.

- **Folders, drawn pairs and a `datasets.Dataset`**: one permutation of all pairs per epoch.
- **Shards**, on disk or on the Hub: a permutation of the shards, and inside each shard a permutation of its rows, so
  that one shard at a time has to be read. The batches go in turn to `lanes` = ranks x loader workers readers, and each
  lane has its own stretch of this order: ranks and workers read different shards.
- **Ranks**: batch b belongs to rank b mod ranks (accelerate's rule). One pass visits every pair once on one rank.
- **Tail**: what is left when no lane can get a full batch any more comes last. On one rank the last batch is shorter;
  on several, the last round of batches is filled up with the first pairs of the epoch (accelerate's `even_batches`),
  which are visited twice: at most ranks x batch size - 1 of them.
- **Resume**: Trainer skips the batches that were trained on as lists of indices, before anything is read or decoded.
  The rest of the epoch is what an uninterrupted run visits, on each rank, if the numbers of ranks and (with shards) of
  workers, the batch size and the accumulation are those of the run. `KCFITrainer` refuses others within an epoch;
  between two they are free, since each epoch has an order of its own.

Streamed data (`rows.RowStream`) comes in its own order, which `datasets` shares out; its docstring says what is exact.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


def epoch_order(sizes: Sequence[int], seed: int, epoch: int) -> NDArray[np.int64]:
    """Indices of all pairs in the order of an epoch, shard after shard.

    Args:
        sizes: Pairs in each shard; a single one for data that has none.
        seed: Seed of the run.
        epoch: Number of the epoch.
    """
    random = np.random.default_rng([seed, epoch])
    starts = np.cumsum([0, *sizes])
    return np.concatenate(
        [starts[shard] + random.permutation(sizes[shard]) for shard in random.permutation(len(sizes))]
    )


def share_out(order: NDArray[np.int64], lanes: int, batch_size: int) -> NDArray[np.int64]:
    """Interleave an order, batch by batch, so that batch b comes from stretch b mod lanes of it.

    Args:
        order: As in `epoch_order`.
        lanes: Readers that take batches in turn.
        batch_size: Pairs per batch.

    Returns:
        The same indices; those for which there is no full batch in every lane come last, as they are.
    """
    even = len(order) // (lanes * batch_size) * lanes * batch_size
    shared = order[:even].reshape(lanes, -1, batch_size).swapaxes(0, 1).ravel()
    return np.concatenate([shared, order[even:]])


class EpochSampler(Sampler[int]):
    """Indices of the pairs in the order of this module.

    Args:
        sizes: As in `epoch_order`.
        seed: Seed of the run.
        lanes: Ranks x loader workers; 1 for data without shards.
        batch_size: Pairs per batch and rank.

    Attributes:
        epoch: To be set before each pass.
    """

    def __init__(self, sizes: Sequence[int], seed: int, lanes: int = 1, batch_size: int = 1) -> None:
        self.sizes, self.seed = sizes, seed
        self.lanes, self.batch_size = lanes, batch_size
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.sizes, self.seed, self.epoch)
        return iter(share_out(order, self.lanes, self.batch_size).tolist())

    def __len__(self) -> int:
        return sum(self.sizes)
