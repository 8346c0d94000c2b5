"""Losses computed in the output layer equal those computed from its log-probs, on every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.config import Model, Parallel
from tests.support import jobs_token_loss as jobs
from tests.support.jobs import TINY
from tests.support.pool import ranks

LAYOUTS = [
    (1, Parallel()),
    (2, Parallel(tp=2)),
    (2, Parallel(pp=2, distributed_optimizer=False)),
    (2, Parallel(pp=2, vpp=2)),
    (2, Parallel()),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("size", "parallel"), LAYOUTS, ids=str)
def test_the_output_layer_computes_the_same_loss(size: int, parallel: Parallel, tied: bool) -> None:
    """Metrics and gradient norms of two steps."""
    for results in ranks(size).run(jobs.learned, parallel=parallel, model=Model(init=replace(TINY, tied=tied))):
        assert results.keys() == jobs.LOSSES.keys()
        for name, (by_layer, by_autograd) in results.items():
            for layer, autograd in zip(by_layer, by_autograd, strict=True):
                assert layer == pytest.approx(autograd, rel=2e-5, abs=1e-6), name
