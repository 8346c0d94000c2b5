"""Attention to a prefix that all sequences share. Its keys and values are computed and stored once.

In decode, each row reads its own keys and values; those of the prefix are read once, in one matrix product for all rows (Hydragen, arXiv
2402.05099; bifurcated attention, arXiv 2403.08845). One softmax runs over both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PrefixKV = tuple[Tensor, Tensor]  # a layer's keys and values of the prefix, each [KV, P, K]


def prefill_attention(prefix: PrefixKV, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """Causal attention of sequences that each continue the prefix; query [T, H, K], key and value [T, KV, K] -> [T, H, K]."""
    out = []
    for q, *own in zip(*(x.split(list(lengths)) for x in (query, key, value)), strict=True):
        k, v = (torch.cat([before, x.transpose(0, 1)], 1)[None] for before, x in zip(prefix, own, strict=True))
        mask = torch.ones(len(q), k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - len(q))
        attended = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=True)
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


def decode_attention_with_prefix(prefix: PrefixKV, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token per row to the prefix and to the row's own C cached positions.

    query [n, KV, G, K], keys and values [n, KV, C, K], mask [n, 1, 1, C] (True: attends) -> [n, KV, G, K]
    """
    n, heads, group, size = query.shape

    def merge_rows(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(heads, n * group, -1)

    def split_rows(x: Tensor) -> Tensor:
        return x.view(heads, n, group, -1).transpose(0, 1)

    shared = split_rows(_product(merge_rows(query), prefix[0].transpose(1, 2)))
    own = _product(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).view(n, heads, group, -1).masked_fill(~mask, -torch.inf)
    weights = (torch.cat([shared, own], -1) * size**-0.5).softmax(-1).to(query.dtype)
    shared, own = weights.split([shared.shape[-1], own.shape[-1]], -1)
    out = _product(own.flatten(0, 1), values.flatten(0, 1)).view(n, heads, group, size)
    return (split_rows(_product(merge_rows(shared), prefix[1])) + out).to(query.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product [B, m, k] @ [B, k, n] in fp32. Rounding scores to bfloat16 would change log-probs by hundredths of a nat."""
    if a.dtype == torch.float32 or a.device.type == "cpu":  # torch has no mixed-precision product on CPU
        return a.float() @ b.float()
    return torch.bmm(a, b, out_dtype=torch.float32)
