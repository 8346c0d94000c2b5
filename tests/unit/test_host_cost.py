"""The host-cost benchmark: launches are replaced during the measurement and restored afterwards."""

from __future__ import annotations

import torch

from benchmarks.kernels.bench_host_cost import page, without_launches
from triton_kernels import swiglu


def test_launches_are_replaced_and_restored() -> None:
    x = torch.full((3, 8), 2.0)
    expected = swiglu(x)
    with without_launches():
        torch.use_deterministic_algorithms(True)  # new memory is filled with NaN, which a launched kernel would overwrite
        try:
            assert swiglu(x).isnan().all()
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.equal(swiglu(x), expected)


def test_the_page_names_operations_above_the_target() -> None:
    results = {"fast": {"no_grad": 14e-6}, "slow": {"no_grad": 16e-6, "forward": 20e-6}}
    before = {"versions": {"commit": "abc"}, "seconds": {"fast": {"no_grad": 30e-6}, "slow": {"no_grad": 31e-6, "forward": 32e-6}}}
    text = page(results, before)
    assert "above it: slow." in text
    assert "the same at commit abc" in text
    assert "| fast | 14.0 (30.0) |  |  |" in text
    assert "| slow | 16.0 (31.0) | 20.0 (32.0) |  |" in text
