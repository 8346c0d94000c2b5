"""Several corpora as one endless order of samples: a pure function of (seed, index), so that resuming needs no state."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

import numpy as np

T = TypeVar("T", covariant=True)  # a sample, or a pair of them


class Rows(Protocol[T]):
    """What is mixed: a Corpus, or Pairs."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> T: ...


class Mixture(Generic[T]):
    """Corpora mixed by weight. An epoch takes round(weight * rows) samples of each and shuffles them together.

    Each corpus is its own endless stream of shuffled passes, and an epoch takes the next samples of it: weight 2 is two passes an epoch,
    weight 0.25 a different quarter each time, so that four epochs see every row once. Raises ValueError for weights that give no samples.
    """

    def __init__(self, corpora: Sequence[Rows[T]], weights: Sequence[float], seed: int) -> None:
        if not corpora or len(corpora) != len(weights):
            raise ValueError(f"a mixture of {len(corpora)} corpora needs as many weights and at least one, not {len(weights)}")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        self._corpora, self._seed = corpora, seed
        self._firsts = [0, *accumulate(map(len, corpora))]
        self._shares = [round(weight * len(corpus)) for corpus, weight in zip(corpora, weights, strict=True)]
        for corpus, weight, share in zip(corpora, weights, self._shares, strict=True):
            if share < 1:
                raise ValueError(f"weight={weight} of a corpus of {len(corpus)} rows gives no sample an epoch; raise it or leave it out")
        self._epoch = lru_cache(maxsize=2)(self._drawn)  # a batch may lie in two epochs

    def __len__(self) -> int:
        """Samples of one epoch."""
        return sum(self._shares)

    def batch(self, step: int, size: int) -> list[T]:
        """Samples step * size up to (step + 1) * size of the endless order."""
        if step < 0 or size < 1:
            raise ValueError(f"step={step} must not be negative, and size={size} must be at least 1")
        return [self._sample(*divmod(index, len(self))) for index in range(step * size, (step + 1) * size)]

    def _sample(self, epoch: int, place: int) -> T:
        row = int(self._epoch(epoch)[place])
        corpus = bisect_right(self._firsts, row) - 1
        return self._corpora[corpus][row - self._firsts[corpus]]

    def _drawn(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in order, int64 [len(self)], numbered through all corpora."""
        rows = np.concatenate([first + self._share(corpus, epoch) for corpus, first in enumerate(self._firsts[:-1])])
        return rows[_shuffled(len(rows), self._seed, 0, epoch)]

    def _share(self, corpus: int, epoch: int) -> np.ndarray:
        """The rows of `corpus` that `epoch` takes: the next ones of its stream."""
        rows, share = len(self._corpora[corpus]), self._shares[corpus]
        start, end = epoch * share, (epoch + 1) * share
        passes = [_shuffled(rows, self._seed, corpus + 1, n) for n in range(start // rows, -(-end // rows))]
        return np.concatenate(passes)[start % rows :][:share]


def _shuffled(count: int, seed: int, stream: int, turn: int) -> np.ndarray:
    """A permutation of range(count), from Philox keyed by the seed with (stream, turn) in the high words of its counter.

    It sorts raw words, since NumPy promises the same ones in every version (NEP 19), which it does not of Generator.permutation.
    """
    words = np.random.Philox(key=seed, counter=[0, 0, stream, turn]).random_raw(count)
    return np.argsort(words, kind="stable")
