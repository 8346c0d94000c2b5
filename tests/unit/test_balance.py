"""With one microbatch per rank, the costliest rank costs no more than by largest differencing; nearly full microbatches stay few."""

import numpy as np
import pytest

from benchmarks.batching.planners import KARMARKAR_KARP, largest_differencing, placement_stats, rounds_needed
from benchmarks.batching.workloads import Workload, workload
from engine.batching.plan import Plan, plan

UNLIMITED = 2**31 - 1
SMALL = [seed for seed in range(200) if len(workload(seed).lengths_N) * workload(seed).ranks <= 100_000]  # plain Python is slow


def costliest(planned: Plan, work: Workload) -> int:
    return max(int(work.costs_N[planned.sequences(rank, 0)].sum()) for rank in range(planned.ranks))


@pytest.mark.parametrize("seed", SMALL)
def test_one_microbatch_per_rank_is_balanced_as_by_largest_differencing(seed: int) -> None:
    work = workload(seed)
    costs = work.costs_N.tolist()
    planned = plan(work.lengths_N, work.ranks, UNLIMITED, cost=work.cost)
    assert planned.microbatches == 1
    assert sorted(planned.order.tolist()) == list(range(len(costs)))
    published = largest_differencing(costs, work.ranks)
    assert costliest(planned, work) <= max(sum(costs[i] for i in part) for part in published)


def test_many_sequences_per_rank_are_balanced_to_one_part_in_a_million() -> None:
    lengths_N = np.clip(np.random.default_rng(0).lognormal(6.72, 0.9, 65_536), 32, 8192).astype(np.int64)
    assert plan(lengths_N, 240, UNLIMITED, cost=(0, 24576, 1)).stats.imbalance < 1 + 1e-6


@pytest.mark.parametrize("on_oversize", ["alone", "drop"])
def test_a_sequence_above_the_budget_shares_its_rank_with_none(on_oversize: str) -> None:
    lengths = [500, *range(1, 40)]
    planned = plan(lengths, 4, 300, on_oversize=on_oversize)  # pyright: ignore[reportArgumentType]
    assert planned.microbatches == 1
    ranks = sorted((planned.sequences(rank, 0).tolist() for rank in range(4)), key=len)
    loads = [sum(lengths[i] for i in ids) for ids in ranks]
    assert loads == ([500, 260, 260, 260] if on_oversize == "alone" else [195] * 4)


def test_groups_stay_together_and_are_balanced() -> None:
    rng = np.random.default_rng(0)
    lengths, groups = rng.integers(1, 4096, 400), np.arange(400) // 2
    planned = plan(lengths, 16, UNLIMITED, cost=(0, 0, 1), group_ids=groups)
    costs = np.bincount(groups, lengths**2).astype(np.int64).tolist()
    published = max(sum(costs[i] for i in part) for part in largest_differencing(costs, 16))
    assert max(int((lengths[planned.sequences(rank, 0)] ** 2).sum()) for rank in range(16)) <= published
    assert all(b == a + 1 for a, b in planned.order.reshape(-1, 2).tolist())


@pytest.mark.parametrize("seed", SMALL)
@pytest.mark.parametrize("room", [1.0003, 1.001, 1.005])
def test_no_microbatch_more_than_two_stages_of_largest_differencing(seed: int, room: float) -> None:
    work = workload(seed)
    lengths, costs = work.lengths_N.tolist(), work.costs_N.tolist()
    budget = int(max(max(lengths), room * sum(lengths) / work.ranks / (1 + seed % 7) + 1))
    shares = KARMARKAR_KARP.over(costs, work.ranks)
    rounds = rounds_needed(shares, lengths, budget)
    placements = [[KARMARKAR_KARP.within(share, by, rounds) for share in shares] for by in (costs, lengths)]
    if all(placement_stats(placement, lengths, costs, budget).over for placement in placements):
        pytest.skip("it exceeds the budget")
    assert plan(work.lengths_N, work.ranks, budget, cost=work.cost).microbatches <= rounds


def test_microbatches_that_are_all_but_full_are_no_more_than_needed() -> None:
    lengths_N = np.random.default_rng(3).integers(100, 2000, 2000)
    for ranks in (4, 16, 50):
        budget = -(-int(lengths_N.sum()) // (4 * ranks)) + 2
        planned = plan(lengths_N, ranks, budget)
        assert planned.microbatches == 4
        assert planned.totals.max() <= budget
