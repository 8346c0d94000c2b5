"""Attention with a shared prefix equals attention with a copy of the prefix before each sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.megatron.prefix_attention import decode_attention_with_prefix, prefill_attention

KV, GROUP, SIZE = 2, 3, 8
Check = Callable[[int, torch.dtype, float], None]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention in float64: query [..., heads, rows, K], keys and values [..., heads, n, K]."""
    return F.scaled_dot_product_attention(query.double(), keys.double(), values.double(), attn_mask=mask)


def check_prompts(shared: int, dtype: torch.dtype, tolerance: float) -> None:
    lengths = [4, 1, 6]
    before = normal(KV, shared, SIZE, seed=0).to(dtype), normal(KV, shared, SIZE, seed=1).to(dtype)
    query, key, value = (normal(11, heads, SIZE, seed=2 + i).to(dtype) for i, heads in enumerate((KV * GROUP, KV, KV)))
    results = prefill_attention(before, query, key, value, lengths)
    assert results.shape == query.shape
    assert results.dtype == dtype
    for actual, q, k, v in zip(*(x.split(lengths) for x in (results, query, key, value)), strict=True):
        keys, values = (torch.cat([past, x.transpose(0, 1)], 1).repeat_interleave(GROUP, 0) for past, x in zip(before, (k, v), strict=True))
        seen = torch.arange(shared + len(q)) <= shared + torch.arange(len(q))[:, None]
        expected = exact(q.transpose(0, 1), keys, values, seen).transpose(0, 1)
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


def check_decoding(shared: int, dtype: torch.dtype, tolerance: float) -> None:
    """Each row attends to its own positions in the cache; later positions are not read."""
    before = normal(KV, shared, SIZE, seed=0).to(dtype), normal(KV, shared, SIZE, seed=1).to(dtype)
    query, keys, values = (normal(5, KV, rows, SIZE, seed=2 + i).to(dtype) for i, rows in enumerate((GROUP, 7, 7)))
    mask = (torch.arange(7) <= torch.tensor([0, 3, 6, 2, 1])[:, None])[:, None, None]
    results = decode_attention_with_prefix(before, query, keys, values, mask)
    assert results.dtype == dtype
    all_keys, all_values = (torch.cat([past.expand(5, -1, -1, -1), own], 2) for past, own in zip(before, (keys, values), strict=True))
    seen = torch.cat([torch.ones(5, 1, 1, shared, dtype=torch.bool), mask], -1)
    torch.testing.assert_close(results.double(), exact(query, all_keys, all_values, seen), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shared", [1, 11])
@pytest.mark.parametrize("check", [check_prompts, check_decoding])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_attention_with_a_prefix(check: Check, shared: int, dtype: torch.dtype, tolerance: float) -> None:
    check(shared, dtype, tolerance)


def test_decoding_scores_are_not_rounded_to_bf16() -> None:
    """For scores around 40, rounding to bfloat16 (8 bits) would change weights by up to a seventh. The result is accurate to 2^-9."""
    before = tuple(5 * normal(KV, 11, SIZE, seed=i).bfloat16() for i in range(2))
    query, keys, values = (5 * normal(5, KV, rows, SIZE, seed=2 + i).bfloat16() for i, rows in enumerate((GROUP, 7, 7)))
    mask = torch.ones(5, 1, 1, 7, dtype=torch.bool)
    results = decode_attention_with_prefix((before[0], before[1]), query, keys, values, mask)
    all_keys, all_values = (torch.cat([past.expand(5, -1, -1, -1), own], 2) for past, own in zip(before, (keys, values), strict=True))
    expected = exact(query, all_keys, all_values, torch.ones(5, 1, 1, 18, dtype=torch.bool))
    assert float((results.double() - expected).abs().max() / expected.abs().max()) < 2**-7
