"""What all sequences begin with: computed once, held once, looked back on by all of them.

A row that decodes reads its own keys and values, one row at a time; those that all rows share are read once, in one product for all of
them (Hydragen, arXiv 2402.05099; bifurcated attention, arXiv 2403.08845). The softmax runs over both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Shared = tuple[Tensor, Tensor]  # a layer's keys and values of the prefix, each [KV, P, K]


def prefill_attention(shared: Shared, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """Causal attention of sequences that each continue the prefix; query [T, H, K], key and value [T, KV, K] -> [T, H, K]."""
    out = []
    for q, *own in zip(*(x.split(list(lengths)) for x in (query, key, value)), strict=True):
        k, v = (torch.cat([before, x.transpose(0, 1)], 1)[None] for before, x in zip(shared, own, strict=True))
        mask = torch.ones(len(q), k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - len(q))
        found = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=True)
        out.append(found[0].transpose(0, 1))
    return torch.cat(out)


def decode_attention_with_prefix(shared: Shared, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token of each row over the prefix and over what follows it; query [n, KV, G, K], keys and values [n, KV, reach, K],
    mask [n, 1, 1, reach] -> [n, KV, G, K]."""
    n, heads, group, size = query.shape

    def together(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(heads, n * group, -1)

    def apart(x: Tensor) -> Tensor:
        return x.view(heads, n, group, -1).transpose(0, 1)

    far = apart(_product(together(query), shared[0].transpose(1, 2)))
    near = _product(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).view(n, heads, group, -1).masked_fill(~mask, -torch.inf)
    weights = (torch.cat([far, near], -1) * size**-0.5).softmax(-1).to(query.dtype)
    far, near = weights.split([far.shape[-1], near.shape[-1]], -1)
    out = _product(near.flatten(0, 1), values.flatten(0, 1)).view(n, heads, group, size)
    return (apart(_product(together(far), shared[1])) + out).to(query.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[B, m, k] @ [B, k, n] in fp32: scores rounded to bfloat16 would move log-probs by hundredths of a nat."""
    if a.dtype == torch.float32 or a.device.type == "cpu":  # no mixed-precision product there
        return a.float() @ b.float()
    return torch.bmm(a, b, out_dtype=torch.float32)
