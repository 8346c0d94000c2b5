"""Microbatches of a batch: the statistics that the forecast needs, from the plan that the run itself would make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine.batching.plan import Plan, plan
from engine.config import ModelShape, Parallel

GRAIN = 16  # the size of a full microbatch is rounded up to 1/16 of the budget, so that nearly equal layouts are simulated once


@dataclass(frozen=True)
class MicrobatchPlan:
    """Statistics of one pass over a batch by all data-parallel ranks."""

    microbatches: int  # per rank
    most: int  # tokens of the largest microbatch, padding included
    cost: float  # mean cost of a microbatch on the rank with the highest cost, in the units of ModelShape.cost
    tokens: int  # largest number of tokens of a rank, padding included
    fill: float  # share of microbatch capacity that holds tokens
    imbalance: float  # largest cost of a rank divided by the mean

    @staticmethod
    def of(lengths_N: np.ndarray, group_N: np.ndarray, model: ModelShape, parallel: Parallel, replicas: int, budget: int) -> MicrobatchPlan:
        """Plan with engine.batching.plan, as Policy.cut does. `budget`: tokens per microbatch. Raises ValueError for longer sequences."""
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
        if interleaved:  # Policy pads all microbatches of a rank to the longest
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
        """Sequence lengths of a full microbatch to simulate: sequences of the batch in order, as far as they fit, then padding."""
        grain = -(-budget // GRAIN // parallel.tp) * parallel.tp
        total = remaining = min(-(-self.most // grain) * grain, budget // parallel.tp * parallel.tp)
        chosen = []
        for length in lengths_N.tolist():
            if 0 < length <= remaining:
                chosen.append(length)
                remaining -= length
        return _padded(tuple(chosen), total)


def attention_cost(lengths: Iterable[int], model: ModelShape) -> float:
    """Cost of one microbatch by the planner's model (ModelShape.cost)."""
    _, per_token, per_square = model.cost
    return float(sum(per_token * length + per_square * length * length for length in lengths))


def _segments(planned: Plan, rank: int, microbatch: int) -> tuple[int, ...]:
    lengths = [int(length) for length in planned.lengths[planned.sequences(rank, microbatch)] if length]
    return _padded(tuple(lengths), planned.total(rank, microbatch))


def _padded(lengths: tuple[int, ...], total: int) -> tuple[int, ...]:
    extra = total - sum(lengths)
    return (*lengths, extra) if extra else lengths
