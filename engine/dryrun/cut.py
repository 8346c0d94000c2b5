"""How a batch falls into microbatches: the plan that the run itself would make, and what of it the forecast needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.batching import Plan, plan
from engine.config import Llama, Parallel


@dataclass(frozen=True)
class Cut:
    """One pass over a batch, of each data-parallel rank."""

    microbatches: int
    typical: tuple[int, ...]  # the sequences of a full microbatch of mean cost, padding last: what is rehearsed
    share: float  # cost of the costliest rank's mean microbatch, in units of the typical's
    tokens: int  # of one rank at most, padding included
    fill: float
    imbalance: float

    @staticmethod
    def of(lengths_N: np.ndarray, group_N: np.ndarray, model: Llama, parallel: Parallel, replicas: int, budget: int) -> Cut:
        """By the planner of engine.batching, as Policy.cut asks for it. Raises ValueError for sequences beyond `budget`."""
        interleaved = parallel.vpp > 1
        planned = plan(
            lengths_N,
            replicas,
            budget,
            cost=model.cost,
            total_multiple=parallel.tp,
            microbatch_multiple=parallel.pp if interleaved else 1,
            group_ids=group_N,
            sync="step",
        )
        ranks = [[_segments(planned, rank, i) for i in range(planned.microbatches)] for rank in range(replicas)]
        if interleaved:  # Policy pads all of a rank's microbatches to its longest
            ranks = [[_padded(segments, max(map(sum, rank))) for segments in rank] for rank in ranks]
        costs = [[_cost(segments, model) for segments in rank] for rank in ranks]
        typical, share = _typical(ranks, costs)
        return Cut(
            microbatches=planned.microbatches,
            typical=typical,
            share=share,
            tokens=max(sum(map(sum, rank)) for rank in ranks),
            fill=planned.stats.fill,
            imbalance=planned.stats.imbalance,
        )


def _typical(ranks: list[list[tuple[int, ...]]], costs: list[list[float]]) -> tuple[tuple[int, ...], float]:
    """Of the microbatches within a hundredth of the most tokens the one of mean cost; and the costliest rank's mean in units of its."""
    most = max(sum(segments) for rank in ranks for segments in rank)
    full = [(cost, segments) for rank, row in zip(ranks, costs, strict=True) for segments, cost in zip(rank, row, strict=True)
            if sum(segments) > 0.99 * most]  # fmt: skip
    mean = sum(cost for cost, _ in full) / len(full)
    cost, typical = min(full, key=lambda pair: (abs(pair[0] - mean), pair[1]))
    return typical, max(sum(row) for row in costs) / len(costs[0]) / cost


def _segments(planned: Plan, rank: int, microbatch: int) -> tuple[int, ...]:
    lengths = [int(length) for length in planned.lengths[planned.sequences(rank, microbatch)] if length]
    return _padded(tuple(lengths), planned.total(rank, microbatch))


def _padded(lengths: tuple[int, ...], total: int) -> tuple[int, ...]:
    extra = total - sum(lengths)
    return (*lengths, extra) if extra else lengths


def _cost(lengths: tuple[int, ...], model: Llama) -> float:
    _, per_token, per_square = model.cost
    return float(per_token * sum(lengths) + per_square * sum(length * length for length in lengths))
