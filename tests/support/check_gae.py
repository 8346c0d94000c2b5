"""Checks of gae, which run on the reference (test_gae.py) and on the kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support import float64
from tests.support.float64 import check_close, normal, packed
from triton_kernels import gae, merge_partials

LENGTHS = [37, 0, 1300, -40, 1, 512, 513, -1, 11]  # one block of the kernel, one token more, and several blocks


def problem(lengths: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cu_seqlens, mask = packed(lengths)
    return normal(len(mask), 1, 0.1).to(dtype), normal(len(mask), 2).to(dtype), mask, cu_seqlens


def check_against_float64(gamma: float, lam: float, dtype: torch.dtype = torch.float32) -> None:
    reward, value, mask, cu_seqlens = problem(LENGTHS, dtype)
    expected, expected_returns = float64.gae(reward, value, mask, cu_seqlens, gamma, lam)
    advantage, returns, partials = gae(reward, value, mask, cu_seqlens, gamma, lam)
    assert advantage.dtype == returns.dtype == partials.dtype == torch.float32
    check_close(advantage, expected)
    check_close(returns, expected_returns)
    assert not advantage[~mask].any()
    assert not returns[~mask].any()
    check_partials(partials, expected, mask, cu_seqlens)


def check_partials(partials: Tensor, advantage: Tensor, mask: Tensor, cu_seqlens: Tensor) -> None:
    """Statistics of each sequence, and merged those of all tokens."""
    ones = torch.ones(len(mask))
    n = float64.sums(ones, mask, cu_seqlens)
    mean = float64.sums(advantage, mask, cu_seqlens) / n.clamp(min=1)
    spread = float64.sums(advantage**2, mask, cu_seqlens) - n * mean**2
    assert partials[0].tolist() == n.tolist()
    size = mean.abs() + (spread.clamp(min=0) / n.clamp(min=1)).sqrt()  # cancellation limits the precision of a mean
    assert ((partials[1] - mean).abs() <= 2e-6 * size).all()
    check_close(partials[2], spread)
    got_n, got_mean, got_m2 = merge_partials(partials)
    counting = advantage[mask]
    assert got_n == len(counting)
    assert abs(got_mean - counting.mean()) <= 2e-6 * counting.std()
    assert abs(got_m2 / (got_n - 1) / counting.var() - 1) <= 2e-6


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.99, 0.9), (1.0, 1.0), (0.0, 0.5)])
def test_against_float64(gamma: float, lam: float) -> None:
    check_against_float64(gamma, lam)


def test_bf16() -> None:
    check_against_float64(1.0, 0.95, torch.bfloat16)


def test_sparse_reward() -> None:
    """Tülu 3's settings: gamma 1, lam 0.95, one score on the last unmasked token. Values of masked tokens are not read."""
    cu_seqlens = torch.tensor([0, 6])
    mask = torch.tensor([True, True, False, True, False, False])
    value = torch.tensor([0.5, 1.0, torch.nan, 2.0, torch.inf, 7.0])
    reward = torch.tensor([0.0, 0.0, 99.0, 10.0, torch.nan, 99.0])
    advantage, returns, _ = gae(reward, value, mask, cu_seqlens, 1.0, 0.95)
    third = 10.0 - 2.0
    second = (2.0 - 1.0) + 0.95 * third
    first = (1.0 - 0.5) + 0.95 * second
    torch.testing.assert_close(advantage, torch.tensor([first, second, 0.0, third, 0.0, 0.0]))
    torch.testing.assert_close(returns, torch.tensor([first + 0.5, second + 1.0, 0.0, 10.0, 0.0, 0.0]))


def test_a_long_gap() -> None:
    """Advantages propagate through masked tokens, such as a tool's output, that span more than a block of the kernel."""
    reward, value, mask, cu_seqlens = problem([1900])
    mask[300:1500] = False
    expected, _ = float64.gae(reward, value, mask, cu_seqlens, 1.0, 0.95)
    advantage, _, partials = gae(reward, value, mask, cu_seqlens, 1.0, 0.95)
    check_close(advantage, expected)
    check_partials(partials, expected, mask, cu_seqlens)


def test_batch_invariance() -> None:
    """Split into two microbatches, one of them padded: the same bits per token, and the same merged statistics."""
    reward, value, mask, cu_seqlens = problem([100, 700, 30, 5])
    advantage, returns, partials = gae(reward, value, mask, cu_seqlens, 1.0, 0.95)
    cut, parts = int(cu_seqlens[2]), []
    for part, ends in ((slice(0, cut), cu_seqlens[:3]), (slice(cut, None), cu_seqlens[2:] - cut)):
        padding = torch.zeros(7)
        inputs = (torch.cat([reward[part], padding]), torch.cat([value[part], padding]), torch.cat([mask[part], padding.bool()]))
        ends = torch.cat([ends, ends[-1:] + 7])
        part_advantage, part_returns, part_partials = gae(*inputs, ends, 1.0, 0.95)
        assert torch.equal(part_advantage[:-7], advantage[part])
        assert torch.equal(part_returns[:-7], returns[part])
        parts.append(part_partials)
    assert merge_partials(torch.cat(parts, 1)) == merge_partials(partials)


def test_empty_input() -> None:
    none, mask = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    for sequences in (0, 2):
        advantage, returns, partials = gae(none, none, mask, torch.zeros(sequences + 1, dtype=torch.int32), 1.0, 0.95)
        assert advantage.shape == returns.shape == (0,)
        assert partials.tolist() == [[0.0] * sequences] * 3
        assert merge_partials(partials) == (0.0, 0.0, 0.0)
