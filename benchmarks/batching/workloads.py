"""Random workloads for balance: lengths lognormal, uniform or heavy-tailed, 8 to 512 sequences per rank on 2 to 256 ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COSTS = ((0, 1, 0), (0, 24576, 1), (0, 4096, 1), (0, 0, 1))  # tokens only; a 7B model; a smaller one; attention only
SHAPES = ("lognormal", "uniform", "heavy-tailed")


@dataclass(frozen=True)
class Workload:
    shape: str
    lengths_N: np.ndarray
    ranks: int
    cost: tuple[int, int, int]

    @property
    def costs_N(self) -> np.ndarray:
        """Cost of each sequence, int64 [N]."""
        return self.cost[1] * self.lengths_N + self.cost[2] * self.lengths_N**2


def workload(seed: int) -> Workload:
    """A pure function of the seed. Ranks and sequences per rank are log-uniform."""
    rng = np.random.default_rng(seed)
    shape = SHAPES[seed % len(SHAPES)]
    ranks, per_rank = round(2 * 128 ** rng.random()), 8 * 64 ** rng.random()
    count = round(ranks * per_rank)
    longest = int(rng.choice([1024, 4096, 8192, 32768]))
    if shape == "lognormal":
        lengths_N = rng.lognormal(np.log(longest) - 2.3, 0.9, count)
    elif shape == "uniform":
        lengths_N = rng.uniform(1, longest, count)
    else:
        lengths_N = 32 * (1 + rng.pareto(1.2, count))
    return Workload(shape, np.clip(lengths_N, 1, longest).astype(np.int64), ranks, COSTS[int(rng.integers(len(COSTS)))])
