"""ReadablePairs: training goes on where single images of a data set are broken (`max_unreadable` of a recipe)."""

from typing import Any

from torch.utils.data import Dataset

from kcfi.training.data.pairs import UnreadablePairError


class ReadablePairs(Dataset[dict[str, Any]]):
    """A data set in which the next readable pair stands in for one that cannot be read.

    So batches keep their sizes and the pairs their order, and who stands in is a function of the files alone: all
    ranks, loader workers and resumed runs see the same. An example that stands in has one more key, "unreadable", the
    error that names the file; `KCFICollator` passes it on, `KCFITrainer` counts and prints it.

    Args:
        pairs: Data set of the examples of `pairs.py`.

    Raises:
        FileNotFoundError: By an example, if no pair can be read and a file of the last one is missing.
        UnreadablePairError: By an example, if no pair can be read.
    """

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            example: dict[str, Any] = self.pairs[index]
            return example
        except (FileNotFoundError, UnreadablePairError) as error:
            unreadable = error
        for later in range(index + 1, index + len(self)):
            try:
                return {**self.pairs[later % len(self)], "unreadable": str(unreadable)}
            except (FileNotFoundError, UnreadablePairError):
                continue
        raise unreadable
