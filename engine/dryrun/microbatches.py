"""How a batch falls into microbatches: the plan that the run itself would make, and what of it the forecast needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine.batching.plan import Plan, plan
from engine.config import ModelShape, Parallel

GRAIN = 16  # sizes of a full microbatch are rounded up to a budget's sixteenths, so that layouts that hardly differ are rehearsed once


@dataclass(frozen=True)
class MicrobatchPlan:
    """One pass over a batch, of each data-parallel rank."""

    microbatches: int
    most: int  # tokens of the largest microbatch, padding included
    cost: float  # of the costliest rank's mean microbatch, in units of Llama.cost
    tokens: int  # of one rank at most, padding included
    fill: float
    imbalance: float

    @staticmethod
    def of(lengths_N: np.ndarray, group_N: np.ndarray, model: ModelShape, parallel: Parallel, replicas: int, budget: int) -> MicrobatchPlan:
        """By the planner of engine.batching.plan, asked as Policy.cut asks it. Raises ValueError for sequences beyond `budget`."""
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
        return MicrobatchPlan(
            microbatches=planned.microbatches,
            most=max(sum(segments) for rank in ranks for segments in rank),
            cost=max(sum(attention_cost(segments, model) for segments in rank) for rank in ranks) / planned.microbatches,
            tokens=max(sum(map(sum, rank)) for rank in ranks),
            fill=planned.stats.fill,
            imbalance=planned.stats.imbalance,
        )

    def full(self, lengths_N: np.ndarray, parallel: Parallel, budget: int) -> tuple[int, ...]:
        """The sequences of a full microbatch, to be rehearsed: those of the batch in order, as far as they fit, padding last."""
        grain = -(-budget // GRAIN // parallel.tp) * parallel.tp
        total = left = min(-(-self.most // grain) * grain, budget // parallel.tp * parallel.tp)
        taken = []
        for length in lengths_N.tolist():
            if 0 < length <= left:
                taken.append(length)
                left -= length
        return _padded(tuple(taken), total)


def attention_cost(lengths: Iterable[int], model: ModelShape) -> float:
    """Of one microbatch, as the planner weighs it."""
    _, per_token, per_square = model.cost
    return float(sum(per_token * length + per_square * length * length for length in lengths))


def _segments(planned: Plan, rank: int, microbatch: int) -> tuple[int, ...]:
    lengths = [int(length) for length in planned.lengths[planned.sequences(rank, microbatch)] if length]
    return _padded(tuple(lengths), planned.total(rank, microbatch))


def _padded(lengths: tuple[int, ...], total: int) -> tuple[int, ...]:
    extra = total - sum(lengths)
    return (*lengths, extra) if extra else lengths
