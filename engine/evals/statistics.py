"""Numbers with their uncertainty: means over items, their standard errors, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959964  # the normal distribution's 97.5 % quantile


class Estimate(NamedTuple):
    """A mean in [0, 1], its standard error, and the number of items that it is taken over."""

    value: float
    error: float
    items: int

    @staticmethod
    def of(clusters: Sequence[Sequence[float]]) -> Estimate:
        """The mean of all values, those of one item being one cluster: sqrt(sum over items of (sum of x - mean)^2) / number of values.

        The clustered standard error of Miller, "Adding error bars to evals" (arXiv 2411.00640), section 2.2. With one value of 0 or 1 an
        item it is the binomial sqrt(p (1 - p) / n).
        """
        count = sum(map(len, clusters))
        mean = sum(map(sum, clusters)) / count
        squares = sum(sum(x - mean for x in cluster) ** 2 for cluster in clusters)
        return Estimate(mean, math.sqrt(squares) / count, len(clusters))

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, which still says something at 0 and 1, where the standard error is 0.

        Its n is the one with which a binomial would have this standard error; at 0 and 1, the number of items.
        """
        p, error, items = self
        n = p * (1 - p) / error**2 if error else items
        centre, scale = p + Z95**2 / (2 * n), 1 + Z95**2 / n
        half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
        return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that k of `samples` responses, drawn without replacement, hold one of the `correct`: 1 - C(n - c, k) / C(n, k).

    Unbiased (Chen et al., arXiv 2107.03374, equation 1).
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)
