"""Tensor-parallel communication overlapped with matrix products gives the same results as without overlap."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from engine.config import Model, Parallel, Recompute
from tests.support import jobs, jobs_gradients, jobs_overlap
from tests.support.pool import ranks

MODEL = Model(init=jobs.TINY)
TP2 = Parallel(tp=2, distributed_optimizer=False)
OVERLAPPED = replace(TP2, tp_comm_overlap=True)
LINEAR = 4 * jobs.TINY.layers  # products with weights in a forward, without the output layer


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_products_gather_rows_and_scatter_sums(size: int, symmetric: bool) -> None:
    results = ranks(size).run(jobs_overlap.products, symmetric=symmetric)
    drawn = []
    for rank in range(size):
        draw = torch.Generator().manual_seed(rank)
        drawn.append([torch.randn(shape, generator=draw) for shape in ((3, 5), (5, 7), (3 * size, 5))])
    full = torch.cat([block for block, _, _ in drawn])
    total = sum(rows @ matrix for _, matrix, rows in drawn)
    assert isinstance(total, torch.Tensor)
    for rank, of_rank in enumerate(results):
        product = full @ drawn[rank][1]
        for actual, expected in zip(of_rank, (full, product, product, total[3 * rank : 3 * rank + 3]), strict=True):
            torch.testing.assert_close(actual, expected)


def check_same(parallel: Parallel, model: Model, symmetric: bool) -> None:
    """Every weight's gradient on every rank is equal to 1e-6 of its largest entry, and the number of overlapped products is as expected."""
    plain = ranks(2).run(jobs_gradients.main_grads, parallel=replace(parallel, tp_comm_overlap=False), model=model, fused=True)
    results = ranks(2).run(jobs_overlap.gradients, parallel=parallel, model=model, symmetric=symmetric)
    for (actual, calls), (expected, _) in zip(results, plain, strict=True):
        if symmetric:  # all of forward, and the row-parallel half of backward; recomputation repeats the forward
            assert calls
            assert calls % (LINEAR + LINEAR // 2) == 0 or parallel.recompute in ("selective", "full")
        assert actual.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(torch.tensor(actual[name]), torch.tensor(values), rtol=0, atol=1e-6 * max(map(abs, values)))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("recompute", ["none", "swiglu", "selective", "full"])
def test_gradients_are_the_same(recompute: Recompute, symmetric: bool) -> None:
    check_same(replace(OVERLAPPED, recompute=recompute), MODEL, symmetric)


@pytest.mark.parametrize("model", [replace(jobs.TINY, tied=True), jobs.TINY.with_scalar_head()], ids=["tied", "scalar"])
def test_gradients_are_the_same_under_other_heads(model: object) -> None:
    assert isinstance(model, type(jobs.TINY))
    check_same(OVERLAPPED, Model(init=model), symmetric=True)


def test_few_rows_are_not_overlapped() -> None:
    """Microbatches of at most 64 tokens, 32 per rank."""
    for _, calls in ranks(2).run(jobs_overlap.gradients, parallel=OVERLAPPED, model=MODEL, symmetric=True, least=64):
        assert calls == 0


def test_without_an_optimizer_gradients_are_autograds_own() -> None:
    for frozen in ("", "linear"):
        plain = ranks(2).run(jobs_gradients.read_only_gradients, parallel=TP2, model=MODEL, frozen=frozen)
        results = ranks(2).run(jobs_overlap.read_only, parallel=OVERLAPPED, model=MODEL, frozen=frozen)
        for actual, expected in zip(results, plain, strict=True):
            assert actual.keys() == expected.keys()
            for name, value in expected.items():
                assert actual[name] == (value if value is None else pytest.approx(value, rel=1e-6)), name


def test_one_rank_is_not_overlapped() -> None:
    alone = replace(OVERLAPPED, tp=1)
    results = ranks(1).run(jobs_overlap.gradients, parallel=alone, model=MODEL, symmetric=False)
    assert results == [(ranks(1).run(jobs_gradients.main_grads, parallel=replace(TP2, tp=1), model=MODEL, fused=True)[0][0], 0)]


@pytest.mark.parametrize(("fault", "error"), [
    ("none", ""),
    ("wrong", r"does not work between these GPUs \(results differ by .*; use parallel.tp_comm_overlap=false"),
    ("refused", r"does not work between these GPUs \(no peer access\); use parallel.tp_comm_overlap=false"),
])  # fmt: skip
def test_it_is_checked_before_it_is_used(fault: str, error: str) -> None:
    for results in ranks(2).run(jobs_overlap.checked, fault=fault):
        assert re.search(error, results) if error else results == ""
