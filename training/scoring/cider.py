"""CIDEr-D of single captions against document frequencies that are counted once (arXiv 1411.5726).

`pycocoevalcap` counts them in the references of the captions that it scores together, which is right for a test split
and wrong for the captions of a training step: there are few of them, and every step would weigh words anew. The scores
are the same where the references are (`tests/training/scoring/test_cider.py`).
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty on another length, in words

Grams = Counter[tuple[str, ...]]


def grams(words: Sequence[str]) -> Grams:
    """How often every n-gram of up to `LONGEST` words occurs."""
    return Counter(
        tuple(words[start : start + size]) for size in range(1, LONGEST + 1) for start in range(len(words) - size + 1)
    )


class CiderD:
    """Scores captions; words are texts between spaces.

    Args:
        corpus: the references of every pair, whose n-grams are counted: one that many pairs share weighs little.
    """

    def __init__(self, corpus: Iterable[Sequence[str]]) -> None:
        documents = [set().union(*(grams(text.split()) for text in references)) for references in corpus]
        self.frequencies = Counter(gram for document in documents for gram in document)
        self.log_documents = math.log(max(1, len(documents)))

    def __call__(self, caption: str, references: Sequence[str]) -> float:
        """The score of a caption, 0 to 10, against its references, of which there is at least one."""
        found, length = self._vectors(caption)
        total = 0.0
        for reference in references:
            true, true_length = self._vectors(reference)
            penalty = math.exp(-((length - true_length) ** 2) / (2 * SIGMA**2))
            for ours, theirs in zip(found, true, strict=True):
                shared = sum(min(ours[gram], theirs[gram]) * theirs[gram] for gram in ours if gram in theirs)
                norms = math.sqrt(_square(ours) * _square(theirs))
                total += penalty * shared / norms if norms else 0.0
        return 10 * total / LONGEST / len(references)

    def _vectors(self, text: str) -> tuple[list[dict[tuple[str, ...], float]], int]:
        """Weights of the n-grams of a text, for each n, and its length in pairs of words."""
        words = text.split()
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in grams(words).items():
            rarity = self.log_documents - math.log(max(1, self.frequencies[gram]))
            vectors[len(gram) - 1][gram] = count * rarity
        return vectors, max(0, len(words) - 1)


def _square(vector: dict[tuple[str, ...], float]) -> float:
    return sum(weight**2 for weight in vector.values())
