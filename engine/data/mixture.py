"""Mix corpora into an endless sequence of samples, a pure function of (seed, index), so that resuming needs no state."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

import numpy as np

T = TypeVar("T", covariant=True)  # a sample, or a pair of them


class Rows(Protocol[T]):
    """A sequence to mix: a Corpus, Pairs or Tasks."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> T: ...


class Mixture(Generic[T]):
    """Corpora mixed by weight. An epoch consists of round(weight * rows) samples of each corpus, shuffled together.

    Each corpus is an endless stream of shuffled passes, from which each epoch takes the next samples: weight 2 means two passes per epoch;
    weight 0.25 a different quarter in each epoch, so that four epochs contain every row once. Raises ValueError if a weight yields no
    samples.
    """

    def __init__(self, corpora: Sequence[Rows[T]], weights: Sequence[float], seed: int) -> None:
        if not corpora or len(corpora) != len(weights):
            raise ValueError(
                f"a mixture needs at least one corpus and one weight per corpus; got {len(corpora)} corpora and {len(weights)} weights"
            )
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0")
        self._corpora, self._seed = corpora, seed
        self._firsts = [0, *accumulate(map(len, corpora))]
        self._shares = [round(weight * len(corpus)) for corpus, weight in zip(corpora, weights, strict=True)]
        for corpus, weight, share in zip(corpora, weights, self._shares, strict=True):
            if share < 1:
                raise ValueError(
                    f"weight={weight} of a corpus of {len(corpus)} rows yields no samples per epoch; raise the weight, or remove the source"
                )
        self._epoch = lru_cache(maxsize=2)(self._order)  # a batch may span two epochs

    def __len__(self) -> int:
        """Number of samples per epoch."""
        return sum(self._shares)

    def batch(self, step: int, size: int) -> list[T]:
        """Samples step * size to (step + 1) * size - 1 of the endless sequence."""
        if step < 0 or size < 1:
            raise ValueError(f"step={step} must be at least 0, and size={size} at least 1")
        return [self._sample(*divmod(index, len(self))) for index in range(step * size, (step + 1) * size)]

    def _sample(self, epoch: int, index: int) -> T:
        row = int(self._epoch(epoch)[index])
        corpus = bisect_right(self._firsts, row) - 1
        return self._corpora[corpus][row - self._firsts[corpus]]

    def _order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in order, int64 [len(self)], numbered consecutively over all corpora."""
        rows = np.concatenate([first + self._share(corpus, epoch) for corpus, first in enumerate(self._firsts[:-1])])
        return rows[_shuffled(len(rows), self._seed, 0, epoch)]

    def _share(self, corpus: int, epoch: int) -> np.ndarray:
        """The rows of `corpus` in `epoch`: the next ones of its stream."""
        rows, share = len(self._corpora[corpus]), self._shares[corpus]
        start, end = epoch * share, (epoch + 1) * share
        passes = [_shuffled(rows, self._seed, corpus + 1, n) for n in range(start // rows, -(-end // rows))]
        return np.concatenate(passes)[start % rows :][:share]


def _shuffled(count: int, seed: int, stream: int, turn: int) -> np.ndarray:
    """A permutation of range(count), from Philox with the seed as key and (stream, turn) in the high words of its counter.

    Sorts raw words: NumPy guarantees that they are the same in all versions (NEP 19), unlike Generator.permutation.
    """
    words = np.random.Philox(key=seed, counter=[0, 0, stream, turn]).random_raw(count)
    return np.argsort(words, kind="stable")
