"""Checks of dpo_norm and seq_logps, which run on the references (test_dpo.py) and on the kernels."""

from __future__ import annotations

import pytest
import torch

from tests.support import float64
from tests.support.float64 import check_close, normal, packed
from triton_kernels import dpo_norm, seq_logps

# Halves whose lengths differ by a factor of 100, an empty sequence, a masked one, a sequence in two pairs, and a pair of one sequence.
LENGTHS = [2300, 23, 0, -40, 64, 1, 200]
PAIRS = torch.tensor([[0, 1], [4, 2], [3, 4], [5, 6], [6, 6]])


def check_against_float64(normalize: bool, smoothing: float, ref_is: str, dtype: torch.dtype = torch.float32) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    cu_seqlens, mask = packed(LENGTHS)
    beta = 5.0 if normalize else 0.1
    logp = normal(len(mask), 1).to(dtype)
    ref = (logp.float() + normal(len(mask), 2, 0.3)).to(dtype)
    ref_S = float64.sums(ref, mask, cu_seqlens)
    if ref_is == "sums":
        ref = ref_S.to(dtype)
        ref_S = ref.double()
    upstream = normal(len(PAIRS), 3).abs() + 0.5

    exact = logp.double().requires_grad_()
    loss, chosen, rejected = float64.dpo(exact, ref_S, mask, cu_seqlens, PAIRS, beta, smoothing, normalize)
    loss.backward(upstream.double())
    assert exact.grad is not None

    logp.requires_grad_()
    actual, metrics = dpo_norm(logp, ref, mask, cu_seqlens, PAIRS, beta, smoothing, normalize, ref_is=ref_is)  # type: ignore[arg-type]
    actual.backward(upstream)
    assert actual.dtype == torch.float32
    assert logp.grad is not None
    assert logp.grad.dtype == dtype
    check_close(actual.detach(), loss.detach(), tolerance)
    check_close(logp.grad, exact.grad, tolerance)
    check_close(metrics.chosen, chosen.detach(), tolerance)
    check_close(metrics.rejected, rejected.detach(), tolerance)
    check_close(metrics.margin, (chosen - rejected).detach(), tolerance)
    assert metrics.accuracy.tolist() == (chosen > rejected).float().tolist()
    assert not any(m.requires_grad for m in metrics)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ref_is", ["tokens", "sums"])
def test_against_float64(normalize: bool, smoothing: float, ref_is: str) -> None:
    check_against_float64(normalize, smoothing, ref_is)


def test_bf16() -> None:
    check_against_float64(True, 0.0, "tokens", torch.bfloat16)


def test_far_margins() -> None:
    """With sequences of one token, any margin can be set: the loss is exact at both ends, and nothing overflows."""
    margins = torch.tensor([-100.0, -80.0, -20.0, -1e-3, 0.0, 1e-3, 1.0, 9.0, 20.0, 80.0, 100.0])
    count = len(margins)
    logp = torch.cat([margins, torch.zeros(count)]).requires_grad_()
    pairs = torch.stack([torch.arange(count), torch.arange(count) + count], 1)
    mask, cu_seqlens = torch.ones(2 * count, dtype=torch.bool), torch.arange(2 * count + 1)
    loss, metrics = dpo_norm(logp, torch.zeros(2 * count), mask, cu_seqlens, pairs, beta=1.0)
    loss.sum().backward()
    exact = -torch.nn.functional.logsigmoid(margins.double())
    assert torch.equal(metrics.margin, margins)
    torch.testing.assert_close(loss.detach().double()[:-1], exact[:-1], rtol=2e-6, atol=0.0)
    assert 0 <= loss[-1] < 1e-43  # exp(-100) is denormal in float32; hardware may flush it to 0
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad.double()[: count - 1], -torch.sigmoid(-margins.double())[:-1], rtol=2e-6, atol=0.0)
    assert torch.equal(logp.grad[:count], -logp.grad[count:])


def test_masked_tokens_are_not_read() -> None:
    cu_seqlens, mask = packed([40, 60, -5])
    pairs = torch.tensor([[0, 1], [1, 2]])
    logp, ref = normal(105, 1), normal(105, 2)
    clean, _ = dpo_norm(logp, ref, mask, cu_seqlens, pairs, 5.0)
    dirty_logp = torch.where(mask, logp, torch.nan).requires_grad_()
    dirty, _ = dpo_norm(dirty_logp, torch.where(mask, ref, -torch.inf), mask.to(torch.uint8), cu_seqlens, pairs, 5.0)
    dirty.sum().backward()
    assert torch.equal(clean, dirty)
    assert dirty_logp.grad is not None
    assert not dirty_logp.grad[~mask].any()
    assert dirty_logp.grad[mask].isfinite().all()


def test_batch_invariance() -> None:
    """The bits of a pair are the same alone, after other sequences, and in a second run."""
    cu_seqlens, mask = packed([37, 1500, 900, 13])
    logp, ref = normal(len(mask), 1).requires_grad_(), normal(len(mask), 2)
    first = int(cu_seqlens[1])
    together, metrics = dpo_norm(logp, ref, mask, cu_seqlens, torch.tensor([[0, 3], [1, 2]]), 5.0)
    (grad_together,) = torch.autograd.grad(together.sum(), logp)
    for _ in range(2):
        alone, metrics_alone = dpo_norm(logp[first:], ref[first:], mask[first:], cu_seqlens[1:] - first, torch.tensor([[0, 1]]), 5.0)
        (grad_alone,) = torch.autograd.grad(alone.sum(), logp)
        assert torch.equal(together[1:], alone)
        assert all(torch.equal(a[1:], b) for a, b in zip(metrics, metrics_alone, strict=True))
        rest = slice(int(cu_seqlens[1]), int(cu_seqlens[3]))
        assert torch.equal(grad_together[rest], grad_alone[rest])


def test_empty_input() -> None:
    """No tokens, no pairs, no sequences: empty results and gradients of zero."""
    none, no_mask, no_pairs = torch.zeros(0), torch.zeros(0, dtype=torch.bool), torch.zeros(0, 2, dtype=torch.int32)
    logp = torch.zeros(0, requires_grad=True)
    for cu_seqlens in (torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)):
        loss, metrics = dpo_norm(logp, none, no_mask, cu_seqlens, no_pairs, 5.0)
        loss.sum().backward()
        assert loss.shape == metrics.margin.shape == (0,)
        assert seq_logps(logp, no_mask, cu_seqlens)[0].tolist() == [0.0] * (len(cu_seqlens) - 1)
    loss, _ = dpo_norm(logp, none, no_mask, torch.zeros(3, dtype=torch.int32), torch.tensor([[0, 1]]), 5.0)
    torch.testing.assert_close(loss, torch.tensor([2.0]).log())
    logp = torch.ones(4, requires_grad=True)
    loss, _ = dpo_norm(logp, torch.ones(4), torch.ones(4, dtype=torch.bool), torch.tensor([0, 4]), no_pairs, 5.0)
    loss.sum().backward()
    assert logp.grad is not None
    assert not logp.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_seq_logps(dtype: torch.dtype) -> None:
    cu_seqlens, mask = packed(LENGTHS)
    logp = normal(len(mask), 1).to(dtype).requires_grad_()
    upstream = normal(len(LENGTHS), 2)
    exact = logp.detach().double().requires_grad_()
    expected = float64.sums(exact, mask, cu_seqlens)
    expected.backward(upstream.double())
    total, count = seq_logps(logp, mask, cu_seqlens)
    total.backward(upstream)
    check_close(total.detach(), expected.detach())
    assert count.tolist() == float64.sums(torch.ones(len(mask)), mask, cu_seqlens).tolist()
    assert not count.requires_grad
    assert logp.grad is not None
    assert exact.grad is not None
    check_close(logp.grad, exact.grad, 2e-6 if dtype == torch.float32 else 1e-2)
