"""Tensor-parallel communication beside products: the same numbers as before or after them."""

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
LINEAR = 4 * jobs.TINY.layers  # products with weights in a forward, without the output layer's


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_products_gather_rows_and_scatter_sums(size: int, symmetric: bool) -> None:
    found = ranks(size).run(jobs_overlap.products, symmetric=symmetric)
    drawn = []
    for rank in range(size):
        draw = torch.Generator().manual_seed(rank)
        drawn.append([torch.randn(shape, generator=draw) for shape in ((3, 5), (5, 7), (3 * size, 5))])
    whole = torch.cat([block for block, _, _ in drawn])
    total = sum(rows @ matrix for _, matrix, rows in drawn)
    assert isinstance(total, torch.Tensor)
    for rank, of_rank in enumerate(found):
        product = whole @ drawn[rank][1]
        for got, expected in zip(of_rank, (whole, product, product, total[3 * rank : 3 * rank + 3]), strict=True):
            torch.testing.assert_close(got, expected)


def check_same(parallel: Parallel, model: Model, symmetric: bool) -> None:
    """Every weight's gradient on every rank, to 1e-6 of its largest; the operations are those of products in each direction."""
    plain = ranks(2).run(jobs_gradients.main_grads, parallel=replace(parallel, tp_comm_overlap=False), model=model, fused=True)
    found = ranks(2).run(jobs_overlap.gradients, parallel=parallel, model=model, symmetric=symmetric)
    for (got, calls), (expected, _) in zip(found, plain, strict=True):
        if symmetric:  # forward, and the half that is row-parallel backward; a recomputed forward calls again
            assert calls
            assert calls % (LINEAR + LINEAR // 2) == 0 or parallel.recompute in ("selective", "full")
        assert got.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(torch.tensor(got[name]), torch.tensor(values), rtol=0, atol=1e-6 * max(map(abs, values)))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("recompute", ["none", "swiglu", "selective", "full"])
def test_gradients_are_the_same(recompute: Recompute, symmetric: bool) -> None:
    check_same(replace(OVERLAPPED, recompute=recompute), MODEL, symmetric)


@pytest.mark.parametrize("model", [replace(jobs.TINY, tied=True), jobs.TINY.with_scalar_head()], ids=["tied", "scalar"])
def test_gradients_are_the_same_under_other_heads(model: object) -> None:
    assert isinstance(model, type(jobs.TINY))
    check_same(OVERLAPPED, Model(init=model), symmetric=True)


def test_few_rows_are_not_overlapped() -> None:
    """Microbatches of at most 64 tokens, 32 a rank."""
    for _, calls in ranks(2).run(jobs_overlap.gradients, parallel=OVERLAPPED, model=MODEL, symmetric=True, least=64):
        assert calls == 0


def test_without_an_optimizer_gradients_are_autograds_own() -> None:
    for frozen in ("", "linear"):
        plain = ranks(2).run(jobs_gradients.read_only_gradients, parallel=TP2, model=MODEL, frozen=frozen)
        found = ranks(2).run(jobs_overlap.read_only, parallel=OVERLAPPED, model=MODEL, frozen=frozen)
        for got, expected in zip(found, plain, strict=True):
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                assert got[name] == (value if value is None else pytest.approx(value, rel=1e-6)), name


def test_one_rank_has_nobody_to_wait_for() -> None:
    alone = replace(OVERLAPPED, tp=1)
    found = ranks(1).run(jobs_overlap.gradients, parallel=alone, model=MODEL, symmetric=False)
    assert found == [(ranks(1).run(jobs_gradients.main_grads, parallel=replace(TP2, tp=1), model=MODEL, fused=True)[0][0], 0)]


@pytest.mark.parametrize(("fault", "said"), [
    ("none", ""),
    ("wrong", r"does not work between these GPUs \(results differ by .*; use parallel.tp_comm_overlap=false"),
    ("refused", r"does not work between these GPUs \(no peer access\); use parallel.tp_comm_overlap=false"),
])  # fmt: skip
def test_it_is_checked_before_it_is_used(fault: str, said: str) -> None:
    for found in ranks(2).run(jobs_overlap.checked, fault=fault):
        assert re.search(said, found) if said else found == ""
