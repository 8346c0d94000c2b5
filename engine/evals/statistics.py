"""Statistics of evaluations: means over items, standard errors, confidence intervals and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959964  # the normal distribution's 97.5 % quantile


class Estimate(NamedTuple):
    """A mean in [0, 1], its standard error, and the number of items."""

    value: float
    error: float
    items: int

    @staticmethod
    def of(clusters: Sequence[Sequence[float]]) -> Estimate:
        """The mean of all values with its clustered standard error; the values of one item are one cluster.

        The standard error is sqrt(sum over items of (sum of x - mean)^2) / number of values (Miller, "Adding error bars to evals", arXiv
        2411.00640, section 2.2). With one value of 0 or 1 per item, this is the binomial sqrt(p (1 - p) / n).
        """
        count = sum(map(len, clusters))
        mean = sum(map(sum, clusters)) / count
        squares = sum(sum(x - mean for x in cluster) ** 2 for cluster in clusters)
        return Estimate(mean, math.sqrt(squares) / count, len(clusters))

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, which is meaningful also for means of 0 and 1, where the standard error is 0.

        n is the sample size at which a binomial has this standard error; at 0 and 1, it is the number of items.
        """
        p, error, items = self
        n = p * (1 - p) / error**2 if error else items
        centre, scale = p + Z95**2 / (2 * n), 1 + Z95**2 / n
        half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
        return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that k of `samples` responses, chosen without replacement, include a correct one: 1 - C(n - c, k) / C(n, k).

    Unbiased (Chen et al., arXiv 2107.03374, equation 1).
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)
