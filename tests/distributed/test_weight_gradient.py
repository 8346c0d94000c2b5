"""Weight gradients with fused accumulation into fp32: equal to separate product and addition, for layouts, heads and precisions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import layers

from engine.config import Model, Parallel
from engine.distributed.world import World
from engine.dryrun.meter import Meter
from engine.dryrun.types import Matmul
from engine.megatron import backend, weight_gradient
from tests.support import jobs, jobs_gradients
from tests.support.pool import ranks

UNTIED, TIED, SCALAR = (Model(init=llama) for llama in (jobs.TINY, replace(jobs.TINY, tied=True), jobs.TINY.with_scalar_head()))
WHOLE = Parallel(distributed_optimizer=False)  # every replica has the full gradient
CASES = [
    (1, WHOLE, UNTIED),
    (1, WHOLE, TIED),
    (2, WHOLE, UNTIED),
    (2, replace(WHOLE, tp=2), UNTIED),
    (2, replace(WHOLE, tp=2), TIED),
    (2, replace(WHOLE, tp=2), SCALAR),
    (2, replace(WHOLE, pp=2), TIED),
    (2, replace(WHOLE, pp=2, vpp=2), UNTIED),
    (2, replace(WHOLE, tp=2, recompute="full"), UNTIED),
    (2, replace(WHOLE, tp=2, recompute="selective"), UNTIED),
]


def gradients(size: int, parallel: Parallel, model: Model, fused: bool) -> list[tuple[dict[str, list[float]], int]]:
    return ranks(size).run(jobs_gradients.main_grads, parallel=parallel, model=model, fused=fused)


def check_near(found: list[float], wanted: list[float], tolerance: float) -> None:
    """The tolerance is relative to the largest entry of each weight's gradient."""
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=tolerance * max(map(abs, wanted)))


@pytest.mark.parametrize(("size", "parallel", "model"), CASES, ids=str)
def test_gradients_are_those_of_two_passes(size: int, parallel: Parallel, model: Model) -> None:
    """To 1e-6 in fp32, on every rank, with untied and tied embeddings."""
    pairs = zip(*(gradients(size, parallel, model, fused) for fused in (True, False)), strict=True)
    for (fused, layers_), (apart, _) in pairs:
        assert layers_ >= 4 * 4 // parallel.pp  # four in each layer of the rank
        assert fused.keys() == apart.keys()
        for name, expected in apart.items():
            assert any(expected), name
            check_near(fused[name], expected, 1e-6)


def test_bf16_weights_lose_one_rounding() -> None:
    """Not fused, the product of each microbatch is rounded to bf16 before the addition, by up to 2^-9; fused, it is added in fp32."""
    model = replace(UNTIED, dtype="bf16")
    ((fused, _),), ((apart, _),) = (gradients(1, WHOLE, model, fused) for fused in (True, False))
    differing = [name for name, expected in apart.items() if fused[name] != expected]
    assert differing
    assert all("linear" in name for name in differing)
    for name, expected in apart.items():
        check_near(fused[name], expected, 2**-8)


def test_without_an_optimizer_gradients_are_autograds_own() -> None:
    """There is no main_grad to accumulate into, and frozen weights have no gradient."""
    (full,) = ranks(1).run(jobs_gradients.read_only_gradients, parallel=Parallel(), model=UNTIED)
    assert all(full.values())
    (some,) = ranks(1).run(jobs_gradients.read_only_gradients, parallel=Parallel(), model=UNTIED, frozen="linear")
    assert some == {name: None if "linear" in name else value for name, value in full.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(dtype: torch.dtype) -> None:
    """To the precision of fp32 for every input dtype: products are exact and summed in fp32."""
    draw = torch.Generator().manual_seed(0)
    given, grad, before = (torch.randn(shape, generator=draw) for shape in ((37, 20), (37, 12), (12, 20)))
    given, grad = given.to(dtype), grad.to(dtype)
    sums = before.clone()
    weight_gradient.wgrad_gemm_accum_fp32(given, grad, sums)
    torch.testing.assert_close(sums.double(), before.double() + grad.double().T @ given.double(), rtol=0, atol=1e-5)
    sums = before.to(dtype, copy=True)
    weight_gradient.wgrad_gemm_accum_fp16(given, grad, sums)
    torch.testing.assert_close(sums.float(), before + grad.float().T @ given.float(), rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_meta_tensors_it_is_one_product(dtype: torch.dtype) -> None:
    """As on a GPU: no additional pass over the gradient, and no allocation."""
    given, grad = (torch.empty(shape, device="meta", dtype=dtype) for shape in ((37, 20), (37, 12)))
    sums = torch.empty(12, 20, device="meta")
    with Meter(torch.device("meta"), {}) as meter:
        weight_gradient.wgrad_gemm_accum_fp32(given, grad, sums)
    work = meter.taken()
    assert work.matmuls == {Matmul(12, 37, 20, accumulates=True): 1}
    assert (work.traffic, work.kernels, meter.peak) == (0, 1, 0)


class Apex:
    """A fake of Apex's module."""


@pytest.mark.parametrize(("place", "installed", "wanted"), [
    ("cpu", False, weight_gradient), ("meta", False, weight_gradient), ("cuda", False, weight_gradient),
    ("cuda", True, Apex), ("cpu", True, weight_gradient), ("meta", True, weight_gradient),
])  # fmt: skip
def test_apex_is_not_shadowed_on_gpus(place: Any, installed: bool, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed:
        monkeypatch.setattr(layers, backend.APEX, Apex, raising=False)
        monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    before = layers.__dict__.get(backend.APEX)
    world = World(place, 0, 1, torch.device(place))
    with backend.cpu_backend(world):
        assert getattr(layers, backend.APEX) is wanted
        with backend.cpu_backend(world):  # a second policy
            assert layers._grad_accum_fusion_available
        assert getattr(layers, backend.APEX) is wanted
    assert layers.__dict__.get(backend.APEX) is before
    assert layers._grad_accum_fusion_available is installed
