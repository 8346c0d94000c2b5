"""Attention behind a shared prefix is attention over a copy of it in front of each sequence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.megatron.prefix import attend_behind, decode_behind

KV, GROUP, SIZE = 2, 3, 8


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """In float64: query [..., KV, G, K] or [..., KV, rows, K], keys and values [..., KV, n, K]."""
    return F.scaled_dot_product_attention(query.double(), keys.double(), values.double(), attn_mask=mask)


@pytest.mark.parametrize("shared", [1, 11])
def test_prompts(shared: int) -> None:
    lengths = [4, 1, 6]
    before = normal(KV, shared, SIZE, seed=0), normal(KV, shared, SIZE, seed=1)
    query, key, value = normal(11, KV * GROUP, SIZE, seed=2), normal(11, KV, SIZE, seed=3), normal(11, KV, SIZE, seed=4)
    found = attend_behind(before, query, key, value, lengths)
    assert found.shape == query.shape
    parts = (x.split(lengths) for x in (found, query, key, value))
    for got, q, k, v in zip(*parts, strict=True):
        keys, values = (torch.cat([past, x.transpose(0, 1)], 1).repeat_interleave(GROUP, 0) for past, x in zip(before, (k, v), strict=True))
        seen = torch.arange(shared + len(q)) <= shared + torch.arange(len(q))[:, None]
        torch.testing.assert_close(got.double(), exact(q.transpose(0, 1), keys, values, seen).transpose(0, 1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shared", [1, 11])
def test_decoding(shared: int) -> None:
    """Rows that look back over as many positions of their own as they have; what the cache holds beyond is not read."""
    before = normal(KV, shared, SIZE, seed=0), normal(KV, shared, SIZE, seed=1)
    query, keys, values = normal(5, KV, GROUP, SIZE, seed=2), normal(5, KV, 7, SIZE, seed=3), normal(5, KV, 7, SIZE, seed=4)
    mask = (torch.arange(7) <= torch.tensor([0, 3, 6, 2, 1])[:, None])[:, None, None]
    found = decode_behind(before, query, keys, values, mask)
    whole = [torch.cat([past.expand(5, -1, -1, -1), own], 2) for past, own in zip(before, (keys, values), strict=True)]
    seen = torch.cat([torch.ones(5, 1, 1, shared, dtype=torch.bool), mask], -1)
    torch.testing.assert_close(found.double(), exact(query, *whole, seen), atol=1e-6, rtol=1e-5)
