"""rmsnorm on CPU: its torch reference against float64, as an operator, under torch.compile, and its errors for invalid input."""

from __future__ import annotations

import pytest
import torch

from engine.dryrun.meter import Meter
from tests.support.layers import EPS, check_rmsnorm, drawn, passes
from triton_kernels import rmsnorm


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (17, 7), (300, 576)])
def test_against_float64(rows: int, width: int, dtype: torch.dtype, fused: bool) -> None:
    check_rmsnorm(rows, width, dtype, fused)


def test_fused_bits_equal_those_of_separate_steps() -> None:
    """In bfloat16 too, where x + residual is rounded before the norm."""
    x, residual, weight = drawn(9, 64, dtype=torch.bfloat16), drawn(9, 64, seed=1, dtype=torch.bfloat16), drawn(64, seed=2)
    normed, total = rmsnorm(x, weight, EPS, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rmsnorm(x + residual, weight, EPS))


def test_an_unused_output_has_no_cost() -> None:
    """No gradient of zeros is allocated for it."""
    x, weight, residual = (drawn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(((5, 16), (16,), (5, 16))))
    normed, total = rmsnorm(x, weight, EPS, residual)
    alone = torch.autograd.grad(normed.sum(), (x, residual, weight), retain_graph=True)
    added = torch.autograd.grad(normed.sum() + 0 * total.sum(), (x, residual, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, added, strict=True))
    assert torch.equal(*torch.autograd.grad(total.sum(), (x, residual), retain_graph=True))
    with Meter(torch.device("cpu"), {}) as meter:
        normed.backward(torch.ones(5, 16))
    assert meter.taken().kernels == 3 + 1  # those of the operator, and a copy, because x and residual have separate gradients


def test_any_leading_dimensions() -> None:
    x, weight = drawn(2, 3, 16), drawn(16, seed=1)
    assert torch.equal(rmsnorm(x, weight, EPS), rmsnorm(x.view(6, 16), weight, EPS).view(2, 3, 16))
    assert rmsnorm(x[0, 0], weight, EPS).shape == (16,)


def test_a_row_of_zeros_has_no_nan() -> None:
    normed, grad, _ = passes(lambda x, weight: rmsnorm(x, weight, EPS), [torch.zeros(2, 8), torch.ones(8)])
    assert not normed.any()
    assert grad.isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
def test_operator(fused: bool) -> None:
    x, weight = drawn(3, 10).requires_grad_(), drawn(10, seed=1).requires_grad_()
    residual = drawn(3, 10, seed=2).requires_grad_() if fused else None
    torch.library.opcheck(torch.ops.trivet.rmsnorm.default, (x, residual, weight, EPS))
    transposed = drawn(10, 3).T.requires_grad_()
    torch.library.opcheck(torch.ops.trivet.rmsnorm.default, (transposed, residual, weight, EPS))
    grad_total = drawn(3, 10, seed=3) if fused else None
    torch.library.opcheck(torch.ops.trivet.rmsnorm_backward.default, (drawn(3, 10), grad_total, x.detach(), weight.detach(), drawn(3)))


def test_compiles_in_one_graph() -> None:
    def layer(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normed, total = rmsnorm(x * 2, weight, EPS, residual)
        return rmsnorm(normed, weight, EPS), total

    inputs = [drawn(5, 12), drawn(12, seed=1), drawn(5, 12, seed=2)]
    compiled = passes(torch.compile(layer, fullgraph=True, backend="aot_eager"), inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, passes(layer, inputs), strict=True))


def test_bad_input_is_named() -> None:
    x, weight = drawn(3, 8), drawn(8)
    with pytest.raises(ValueError, match="x has dtype float64; use bfloat16, float16 or float32"):
        rmsnorm(x.double(), weight, EPS)
    with pytest.raises(ValueError, match=r"weight has shape \[7\] where \[8\] is needed, as wide as x"):
        rmsnorm(x, weight[:7], EPS)
    with pytest.raises(ValueError, match="residual has dtype bfloat16 and x float32; make them equal"):
        rmsnorm(x, weight, EPS, x.bfloat16())
    with pytest.raises(ValueError, match=r"residual has shape \[2, 8\] where \[3, 8\] is needed"):
        rmsnorm(x, weight, EPS, x[:2])
    with pytest.raises(ValueError, match="weight is on meta and x on cpu; move one of them"):
        rmsnorm(x, weight.to("meta"), EPS)
    with pytest.raises(ValueError, match=r"x has shape \[\]; use \[..., width\]"):
        rmsnorm(torch.tensor(1.0), weight, EPS)
