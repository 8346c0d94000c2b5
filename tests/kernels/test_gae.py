"""gae on CPU: its torch reference, as an operator, its errors for invalid input, and merging its statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import check_gae
from tests.support.check_gae import (  # noqa: F401 (collected here as tests)
    test_a_long_gap,
    test_against_float64,
    test_batch_invariance,
    test_bf16,
    test_empty_input,
    test_sparse_reward,
)
from triton_kernels import gae, merge_partials


def test_merging_keeps_a_small_spread_around_a_large_mean() -> None:
    """With sums of squares in float32 the variance would be 0 or negative here."""
    values = 1e4 + 1e-2 * torch.randn(4, 250, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    partials = torch.stack([torch.full((4,), 250.0), values.mean(1), ((values - values.mean(1, keepdim=True)) ** 2).sum(1)])
    n, mean, m2 = merge_partials(partials)
    assert n == 1000
    assert mean == pytest.approx(float(values.mean()), rel=1e-14)
    assert m2 / 999 == pytest.approx(float(values.var()), rel=1e-8)


def test_no_gradient_flows_through_an_advantage() -> None:
    reward, value, mask, cu_seqlens = check_gae.problem([9])
    advantage, returns, _ = gae(reward, value.requires_grad_(), mask, cu_seqlens, 1.0, 0.95)
    assert not advantage.requires_grad
    assert not returns.requires_grad


def test_operator_keeps_the_rules_of_torch() -> None:
    torch.library.opcheck(torch.ops.trivet.gae.default, (*check_gae.problem([4, 0, -2, 5]), 1.0, 0.95))


def test_compiles_whole() -> None:
    inputs = check_gae.problem([4, 0, -2, 5])
    compiled = torch.compile(gae, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*inputs, 1.0, 0.95), gae(*inputs, 1.0, 0.95), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 7, 5, 11])}, r"cu_seqlens\[2\]=5 is less than cu_seqlens\[1\]=7"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens=\[0\] ... \[5\] must run from 0 to T=11"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"must run from 0 to T=11"),
        ({"reward": torch.zeros(11, dtype=torch.int64)}, r"reward is int64 \[11\]"),
        ({"value": torch.zeros(10)}, r"value is float32 \[10\] on cpu; it must be float32 or bfloat16 \[T\] = \[11\]"),
        ({"mask": torch.ones(10, dtype=torch.bool)}, r"mask is bool \[10\]"),
        ({"gamma": 1.5}, r"gamma=1.5 must be in \[0, 1\]"),
        ({"lam": -0.1}, r"lam=-0.1 must be in \[0, 1\]"),
    ],
)
def test_bad_input_is_answered_in_one_line(wrong: dict[str, Any], message: str) -> None:
    reward, value, mask, cu_seqlens = check_gae.problem([4, 0, -2, 5])
    right = {"reward": reward, "value": value, "mask": mask, "cu_seqlens": cu_seqlens, "gamma": 1.0, "lam": 0.95}
    with pytest.raises(ValueError, match=message):
        gae(**{**right, **wrong})


def test_partials_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"partials has shape \[4, 3\]; it must be \[3, S\]"):
        merge_partials(torch.zeros(4, 3))
