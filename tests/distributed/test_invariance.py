"""Results do not depend on the parallel layout, microbatches, packing or recomputation."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from engine.config import Model, Parallel
from tests.support import jobs, jobs_batching
from tests.support.pool import ranks

UNTIED, TIED = Model(init=jobs.TINY), Model(init=replace(jobs.TINY, tied=True))


@lru_cache
def one_rank(model: Model = UNTIED) -> list[dict[str, float]]:
    return ranks(1).run(jobs.sft_steps, parallel=Parallel(), model=model)[0]


def check_same(size: int, parallel: Parallel, model: Model = UNTIED, **cut: Any) -> None:
    """Loss and gradient norm of every step, on every rank, equal those of one rank to 1e-5."""
    for results in ranks(size).run(jobs.sft_steps, parallel=parallel, model=model, **cut):
        for actual, expected in zip(results, one_rank(model), strict=True):
            assert actual == pytest.approx(expected, rel=1e-5)


LAYOUTS = [
    (2, Parallel()),
    (2, Parallel(tp=2)),
    (2, Parallel(pp=2)),
    (2, Parallel(pp=2, vpp=2)),
    (2, Parallel(pp=2, stages=(3, 1))),
    (2, Parallel(pp=2, stages=(1, 1, 2, 0), vpp=2)),
    (4, Parallel(tp=2, pp=2)),
    (4, Parallel(pp=4)),
    (8, Parallel(tp=2, pp=2)),
    (8, Parallel(tp=2, pp=2, vpp=2)),
]


@pytest.mark.parametrize(("size", "parallel"), LAYOUTS, ids=str)
def test_grid(size: int, parallel: Parallel) -> None:
    check_same(size, parallel)


@pytest.mark.parametrize("parallel", [Parallel(tp=2), Parallel(pp=2), Parallel()], ids=str)
def test_tied_embeddings(parallel: Parallel) -> None:
    check_same(2, parallel, TIED)


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2), Parallel(pp=2)], ids=str)
def test_optimizer_sharded_or_not(parallel: Parallel) -> None:
    check_same(2, replace(parallel, distributed_optimizer=False))


@pytest.mark.parametrize("recompute", ["swiglu", "selective", "full"])
@pytest.mark.parametrize("parallel", [Parallel(tp=2), Parallel(pp=2)], ids=str)
def test_recompute(parallel: Parallel, recompute: Any) -> None:
    check_same(2, replace(parallel, recompute=recompute))


@pytest.mark.parametrize("budget", [24, 40, 1000])
@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2), Parallel(pp=2, vpp=2)], ids=str)
def test_microbatch_budget(parallel: Parallel, budget: int) -> None:
    check_same(2, parallel, budget=budget)


@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel()), (2, Parallel(tp=2)), (2, Parallel(pp=2))], ids=str)
def test_packed_or_one_sequence_per_microbatch(size: int, parallel: Parallel) -> None:
    check_same(size, parallel, alone=True)


def test_order_within_a_batch() -> None:
    check_same(2, Parallel(), order=5)


def test_ranks_without_sequences_train_on_padding() -> None:
    """If all sequences fit one microbatch, the second replica of dp2 has only padding."""
    check_same(4, Parallel(pp=2), budget=1000)


@lru_cache
def dpo_on_one_rank() -> list[dict[str, float]]:
    return ranks(1).run(jobs.dpo_steps, parallel=Parallel(), model=UNTIED)[0]


DPO_CUTS = [
    (1, Parallel(), {"budget": 1000}),
    (1, Parallel(), {"order": 5}),
    (2, Parallel(), {}),
    (2, Parallel(), {"budget": 48, "order": 3}),
    (2, Parallel(tp=2), {}),
    (2, Parallel(tp=2), {"budget": 48}),
    (2, Parallel(pp=2), {}),
    (2, Parallel(pp=2, vpp=2), {"budget": 100, "order": 7}),
    (4, Parallel(), {"budget": 1000}),  # replicas without a pair
    (8, Parallel(tp=2, pp=2), {}),
]


@pytest.mark.parametrize(("size", "parallel", "cut"), DPO_CUTS, ids=str)
def test_dpo(size: int, parallel: Parallel, cut: dict[str, int]) -> None:
    """All metrics, correlations and gradient norms, with and without the NLL term. Counts are pairs, and no pair is split."""
    for results in ranks(size).run(jobs.dpo_steps, parallel=parallel, model=UNTIED, **cut):
        for actual, expected in zip(results, dpo_on_one_rank(), strict=True):
            # A correlation near 0 is a difference of sums over few pairs and has fewer correct digits.
            bias = "reward/length_bias"
            assert actual.pop(bias) == pytest.approx(expected[bias], abs=1e-5)
            assert actual == pytest.approx({name: value for name, value in expected.items() if name != bias}, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel()), (2, Parallel()), (2, Parallel(tp=2)), (2, Parallel(pp=2, vpp=2))], ids=str)
def test_logprobs(size: int, parallel: Parallel) -> None:
    full = ranks(1).run(jobs.logprobs, parallel=Parallel(), model=UNTIED, budget=24)[0]
    seen: dict[int, list[float]] = {}
    for results in ranks(size).run(jobs.logprobs, parallel=parallel, model=UNTIED):
        seen |= results
    assert seen.keys() == full.keys()
    for i, values in full.items():
        assert seen[i] == pytest.approx(values, abs=2e-6)


def test_240_ranks_equal_one_rank() -> None:
    """Loss, gradient norm and denominator of a step do not change if it is planned for 240 ranks, some with only padding."""
    (many, counted), (one, counted_by_one) = (
        ranks(1).run(jobs_batching.step_of_many_ranks, model=UNTIED, ranks=n, count=300)[0] for n in (240, 1)
    )
    assert many == pytest.approx(one, rel=1e-5)
    assert counted == counted_by_one == sum(int(sample.mask.sum()) for sample in jobs.samples(3, 300))


def test_bf16_follows_fp32() -> None:
    """bf16 weights with fp32 master weights and gradients give the same run, to the precision of bf16."""
    results = ranks(2).run(jobs.sft_steps, parallel=Parallel(), model=replace(UNTIED, dtype="bf16"))[0]
    for actual, expected in zip(results, one_rank(), strict=True):
        assert actual == pytest.approx(expected, rel=2e-2)
