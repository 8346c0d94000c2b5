"""Plans against slow Python: every sequence once, within the budget, and equally many microbatches of nearly equal cost on every rank."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings

from engine.batching.plan import Plan, plan
from tests.support.cases import Case, best_fit_decreasing, cases, lognormal, microbatches_of, round_up, steps_of

many = settings(deadline=None, max_examples=200)


@given(cases())
@many
def test_a_plan_tiles_the_sequences_within_its_limits(case: Case) -> None:
    planned = case.plan()
    slots = [ids for rank in microbatches_of(planned) for ids in rank]
    oversize = case.oversize()
    assert sorted(planned.order.tolist()) == sorted(i for unit in case.kept() for i in unit)
    assert len(planned.offsets) == case.ranks * planned.microbatches + 1
    assert (planned.offsets[0], planned.offsets[-1]) == (0, len(planned.order))
    assert planned.oversize.tolist() == sorted(oversize)
    assert planned.stats.dropped == (len(oversize) if case.on_oversize == "drop" else 0)
    for unit in case.kept():
        (home,) = [ids for ids in slots if set(unit) & set(ids)]
        assert home[home.index(unit[0]) :][: len(unit)] == unit  # complete, contiguous, in order
        assert case.tokens(home) <= case.capacity if unit[0] not in oversize else home == unit


@given(cases())
@many
def test_every_step_has_its_own_microbatches(case: Case) -> None:
    planned = case.plan()
    assert planned.step_ids.tolist() == case.steps()
    assert (planned.step_offsets[0], planned.step_offsets[-1]) == (0, planned.microbatches)
    for step, ranks in steps_of(planned):
        units = [unit for unit in case.kept() if case.step_of(unit[0]) == step]
        m = len(ranks[0])
        assert m % case.microbatch_multiple == 0
        assert sorted(i for rank in ranks for ids in rank for i in ids) == sorted(i for unit in units for i in unit)
        if case.cost[0] == 0:  # else more microbatches may cost less
            sizes = [min(case.tokens(unit), case.capacity) if unit[0] in case.oversize() else case.tokens(unit) for unit in units]
            at_least = -(-sum(sizes) // case.capacity)
            assert m >= round_up(-(-at_least // case.ranks), case.microbatch_multiple)
            assert m <= round_up(-(-_bins_needed(case, units) // case.ranks), case.microbatch_multiple)


def _bins_needed(case: Case, units: list[list[int]]) -> int:
    alone = [unit for unit in units if unit[0] in case.oversize()]
    return len(alone) + best_fit_decreasing([case.tokens(unit) for unit in units if unit not in alone], case.capacity)


@given(cases())
@many
def test_statistics_equal_their_definitions(case: Case) -> None:
    planned = case.plan()
    lockstep, slowest, total = 0, 0, 0
    for _, ranks in steps_of(planned):
        costs = [[case.cost_of(ids) for ids in rank] for rank in ranks]
        assert all(rank == sorted(rank, reverse=True) for rank in costs)
        lockstep += sum(map(max, zip(*costs, strict=True)))
        slowest += max(map(sum, costs))
        total += sum(map(sum, costs))
    tokens, room = sum(case.lengths[i] for i in planned.order), case.ranks * planned.microbatches * case.token_budget
    assert planned.stats.fill == (pytest.approx(tokens / room) if room else 0.0)
    assert planned.stats.imbalance == (pytest.approx(slowest * case.ranks / total) if total else 1.0)
    assert planned.stats.lockstep == (pytest.approx(lockstep * case.ranks / total) if total else 1.0)


@given(cases())
@many
def test_denominators_count_the_step_for_any_number_of_ranks(case: Case) -> None:
    trained = case.lengths if case.trained is None else case.trained
    for planned in (case.plan(), case.plan(ranks=case.ranks + 1, microbatch_multiple=1)):
        for s, step in enumerate(case.steps()):
            units = [[trained[i] for i in unit] for unit in case.kept() if case.step_of(unit[0]) == step]
            assert planned.denominators.tokens[s] == sum(map(sum, units))
            assert planned.denominators.sequences[s] == sum(count > 0 for unit in units for count in unit)
            assert planned.denominators.groups[s] == sum(any(unit) for unit in units)


@given(cases())
@many
def test_boundaries_and_inverse(case: Case) -> None:
    planned = case.plan()
    for place, i in enumerate(planned.order.tolist()):
        assert planned.inverse[i] == place
    assert (planned.inverse < 0).sum() == planned.stats.dropped
    for slot, ids in enumerate(ids for rank in microbatches_of(planned) for ids in rank):
        here = slice(planned.offsets[slot] + slot, planned.offsets[slot + 1] + slot + 1)
        assert planned.cu_seqlens[here].tolist() == np.cumsum([0] + [case.lengths[i] for i in ids]).tolist()
        assert planned.cu_seqlens_padded[here].tolist() == np.cumsum([0] + [case.padded(i) for i in ids]).tolist()
        assert planned.totals[slot] == round_up(max(case.tokens(ids), 1), case.total_multiple)


def same(first: Plan, other: Plan) -> bool:
    arrays = [f.name for f in dataclasses.fields(Plan) if isinstance(getattr(first, f.name), np.ndarray)]
    assert len(arrays) == 10
    return first.stats == other.stats and all(np.array_equal(getattr(first, name), getattr(other, name)) for name in arrays)


@given(cases())
@settings(deadline=None)
def test_planning_is_deterministic(case: Case) -> None:
    assert same(case.plan(), case.plan())
    narrow = case.plan(lengths=np.array(case.lengths, np.int32), group_ids=np.array(case.group_ids, np.int8))
    assert same(case.plan(), narrow)


def test_ties_go_to_the_lower_index() -> None:
    planned = plan([4, 4, 4, 4, 4], ranks=2, token_budget=8)
    # Balanced over four bins: [0, 4] [1] [2] [3]. Distributed by cost: [0, 4] and [1], then [2] to the less loaded rank 1.
    assert microbatches_of(planned) == [[[0, 4], [3]], [[1], [2]]]


def test_a_plan_does_not_alias_its_lengths() -> None:
    lengths = np.array([3, 2])
    planned = plan(lengths, 1, 8)
    lengths[:] = 0
    assert planned.lengths.tolist() == [3, 2]


@pytest.mark.parametrize("microbatch_multiple", [1, 4])
@pytest.mark.parametrize(
    ("lengths", "ranks", "microbatches"),
    [
        ([], 3, 0),
        ([5], 1, 1),
        ([5], 3, 1),  # fewer than ranks
        ([8, 8, 8], 1, 3),  # each as long as the budget
        ([4] * 12, 3, 2),  # all equal
        ([0, 0, 0], 2, 1),
        ([8, 0], 1, 1),  # an empty sequence takes no space
    ],
)
def test_edges(lengths: list[int], ranks: int, microbatches: int, microbatch_multiple: int) -> None:
    planned = plan(lengths, ranks, token_budget=8, microbatch_multiple=microbatch_multiple)
    assert planned.microbatches == round_up(microbatches, microbatch_multiple)
    assert sorted(planned.order.tolist()) == list(range(len(lengths)))
    assert sum(bool(ids) for rank in microbatches_of(planned) for ids in rank) == min(ranks * planned.microbatches, len(lengths))


def test_all_oversize() -> None:
    alone = plan([9, 20, 9], ranks=2, token_budget=8, on_oversize="alone")
    assert sorted(ids for rank in microbatches_of(alone) for ids in rank) == [[], [0], [1], [2]]
    dropped = plan([9, 20, 9], ranks=2, token_budget=8, on_oversize="drop")
    assert (dropped.microbatches, len(dropped.order), dropped.stats.dropped, dropped.inverse.tolist()) == (0, 0, 3, [-1] * 3)
    assert alone.oversize.tolist() == dropped.oversize.tolist() == [0, 1, 2]


def test_sequences_of_different_steps_are_not_mixed() -> None:
    planned = plan([8, 8, 8, 8, 1, 1], ranks=2, token_budget=8, step_ids=[5, 5, 5, 5, 9, 9])
    assert (planned.step_ids.tolist(), planned.step_offsets.tolist()) == ([5, 9], [0, 2, 3])
    assert [sorted(i for rank in ranks for ids in rank for i in ids) for _, ranks in steps_of(planned)] == [[0, 1, 2, 3], [4, 5]]
    assert planned.denominators.tokens.tolist() == [32, 2]
    assert planned.stats.algorithms == ("level", "level")


def test_a_step_without_sequences_left_has_no_microbatches() -> None:
    planned = plan([99, 3], ranks=1, token_budget=8, step_ids=[0, 1], on_oversize="drop")
    assert (planned.step_offsets.tolist(), planned.stats.algorithms) == ([0, 0, 1], ("none", "level"))


def test_more_microbatches_if_they_cost_less() -> None:
    """With one microbatch per rank, one is {5, 1, 1, 1} and costs 28. With two, the rank with the 5 has nothing else and costs 25."""
    dear, cheap = (plan([5, 3] + [1] * 8, 2, 8, cost=(c0, 0, 1), sync="step") for c0 in (10, 1))
    assert (dear.microbatches, cheap.microbatches) == (1, 2)
    assert cheap.stats.imbalance == (25 + 2) / ((25 + 9 + 8) / 2 + 2)


@pytest.mark.parametrize(
    ("count", "ranks", "budget", "imbalance", "lockstep"),
    [
        (65_536, 240, 16_384, 1.001, 1.005),
        (4_096, 240, 16_384, 1.005, 1.005),
        (4_096, 240, 8_192, 1.06, 1.06),
        (65_536, 32, 8_192, 1.005, 1.005),  # 99.85 % full
    ],
)
def test_rollouts_are_balanced(count: int, ranks: int, budget: int, imbalance: float, lockstep: float) -> None:
    lengths = lognormal(count)
    planned = plan(lengths, ranks, budget, cost=(0, 24576, 1))
    assert sorted(planned.order.tolist()) == list(range(count))
    assert planned.microbatches == math.ceil(lengths.sum() / budget / ranks)  # the lower bound
    assert planned.stats.imbalance <= imbalance
    assert planned.stats.lockstep <= lockstep
    assert planned.totals.max() <= budget


def test_number_of_bins_is_minimal() -> None:
    lengths = lognormal(65_536)
    assert plan(lengths, 1, 16_384).microbatches <= 1.001 * -(-int(lengths.sum()) // 16_384)


@pytest.mark.parametrize("budget", [8_192, 12_000, 32_768])
@pytest.mark.parametrize("ranks", [1, 8, 32, 240])
@pytest.mark.parametrize("count", [500, 4_096])
def test_number_of_microbatches_is_minimal_up_to_99_8_percent_fill(count: int, ranks: int, budget: int) -> None:
    lengths = lognormal(count)
    fewest = math.ceil(lengths.sum() / budget / ranks)
    if lengths.sum() <= 0.998 * budget * ranks * fewest:
        assert plan(lengths, ranks, budget, cost=(0, 24576, 1)).microbatches == fewest


def test_lockstep_cost_is_minimized() -> None:
    lengths = lognormal(4_096)
    each, once = (plan(lengths, 240, 8_192, cost=(0, 24576, 1), sync=sync).stats for sync in ("microbatch", "step"))
    assert (each.algorithms, once.algorithms) == (("skewed",), ("by_rank",))
    assert each.lockstep < 1.06 < once.lockstep
    assert once.imbalance < 1.005 < each.imbalance


def test_pairs_are_balanced_too() -> None:
    lengths = lognormal(4_096)
    planned = plan(lengths, 32, 16_384, cost=(0, 24576, 1), group_ids=np.arange(4_096) // 2)
    assert planned.stats.lockstep < 1.005
    assert all(a % 2 == 0 and b == a + 1 for a, b in planned.order.reshape(-1, 2).tolist())


def test_more_than_int32_tokens() -> None:
    planned = plan([2**30] * 5, ranks=2, token_budget=2**31 - 1)
    assert (planned.microbatches, planned.denominators.tokens.tolist()) == (3, [5 * 2**30])
    assert planned.cu_seqlens.max() == 2**30


def test_budgets_beyond_the_bitmap_are_respected() -> None:
    lengths = np.random.default_rng(0).integers(1, 2**20, 500)
    planned = plan(lengths, 1, 2**20 + 7, cost=(0, 1, 1))
    assert planned.totals.max() <= 2**20 + 7
    assert sorted(planned.order.tolist()) == list(range(500))


def test_costs_beyond_float64_are_exact() -> None:
    """Costs that differ by one part in 2**58 still decide which rank is the lighter."""
    planned = plan([8, 7, 6, 5], ranks=2, token_budget=8, cost=(2**58, 1, 0))
    assert microbatches_of(planned) == [[[0], [3]], [[1], [2]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [3, 9]}, "sequence 1 has 9 tokens, more than token_budget=8; raise tokens_per_microbatch or shorten/truncate it"),
        ({"lengths": [3, 8], "total_multiple": 3}, "sequence 1 has 8 tokens, more than token_budget=8 (6 in multiples of 3); raise"),
        ({"lengths": [3, 7], "seq_multiple": 5}, "sequence 1 has 10 tokens, more than token_budget=8; raise"),
        ({"lengths": [1, 5, 5], "group_ids": [0, 7, 7]}, "group 7 (2 sequences, the first is 1) has 10 tokens, more than token_budget=8"),
        (
            {"group_ids": [2, 2], "step_ids": [0, 1]},
            "group 2 spans steps 0 (sequence 0) and 1 (sequence 1); give its sequences one step id",
        ),
        ({"lengths": [3, 2**31]}, "sequence 1 has length 2147483648; a length is at most 2**31 - 1"),
        ({"lengths": [2**31 - 1], "total_multiple": 8, "on_oversize": "alone"}, "over 2**31 - 1 even in a microbatch of its own"),
        ({"lengths": [3, -1]}, "sequence 1 has length -1; a length is at least 0"),
        ({"lengths": [1.5]}, "lengths is float64 of shape (1,); pass"),
        ({"lengths": [[1]]}, "lengths is int64 of shape (1, 1); pass"),
        ({"group_ids": [0]}, "group_ids has 1 entries for 2 lengths"),
        ({"ranks": 0}, "ranks=0 must be at least 1"),
        ({"token_budget": 0}, "token_budget=0 must be at least 1"),
        ({"token_budget": 2**31}, "token_budget=2147483648 exceeds"),
        ({"ranks": 2**20, "microbatch_multiple": 2**20}, "ranks=1048576 times microbatch_multiple=1048576 is over"),
        ({"total_multiple": 0}, "total_multiple=0 must be at least 1"),
        ({"total_multiple": 16}, "token_budget=8 is below total_multiple=16; raise tokens_per_microbatch to 16"),
        ({"seq_multiple": 16}, "token_budget=8 is below seq_multiple=16; raise tokens_per_microbatch to 16"),
        ({"microbatch_multiple": -1}, "microbatch_multiple=-1 must be at least 1"),
        ({"cost": (0, -1, 0)}, "cost=(0, -1, 0) must be three integers"),
        ({"cost": (0, 0.5, 0)}, "cost=(0, 0.5, 0) must be three integers"),
        ({"cost": (0, 2**61, 1)}, "makes these sequences cost more than 2**62; divide all three by a common factor"),
        ({"cost": (2**61, 0, 0)}, "makes these sequences cost more than 2**62"),
        ({"cost": (0, 0, 2**61)}, "makes these sequences cost more than 2**62"),
        ({"sync": "never"}, "sync='never' is unknown; use 'microbatch' or 'step'"),
        ({"on_oversize": "cut"}, "on_oversize='cut' is unknown; use 'error' or 'alone' or 'drop'"),
    ],
)
def test_invalid_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        plan(**{"lengths": [3, 4], "ranks": 1, "token_budget": 8, **arguments})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
