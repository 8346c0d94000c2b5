"""decode_attention against float64: the same checks for the kernel, in the interpreter and on a GPU, and for the torch reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_kernels import decode_attention

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def problem(
    lengths: list[int],
    heads: int,
    group: int,
    size: int,
    positions: int,
    dtype: torch.dtype = torch.float32,
    spare: int = 0,
    beyond: float = torch.nan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values (`spare` more slots than rows) and lengths. Positions after a row's length are filled with `beyond`."""
    generator = torch.Generator().manual_seed(0)
    slots = len(lengths) + spare
    query = torch.randn(len(lengths), heads * group, size, generator=generator).to(dtype)
    keys, values = (torch.randn(slots, heads, positions, size, generator=generator).to(dtype) for _ in range(2))
    for slot, length in enumerate([*lengths, *[0] * spare]):
        keys[slot, :, length:] = values[slot, :, length:] = beyond
    return query, keys, values, torch.tensor(lengths, dtype=torch.int32)


def expected(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """The definition in float64, row by row and head by head."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    for row, length in enumerate(lengths.tolist()):
        for head in range(query.shape[1] if length else 0):
            k, v = (kept[row, head // group, :length].double() for kept in (keys, values))
            out[row, head] = (k @ query[row, head].double() / query.shape[2] ** 0.5).softmax(0) @ v
    return out


def check(*shape: Any, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    given = problem(*shape, dtype=dtype, **options)
    actual = decode_attention(*given)
    wanted = expected(*given)
    assert actual.dtype == dtype
    assert actual.shape == wanted.shape
    if wanted.numel():
        assert float((actual.double() - wanted).abs().max()) <= TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))


def check_batch_invariance() -> None:
    """The bits of a row are the same alone, with a longer cache, and in a second run."""
    query, keys, values, lengths = problem([300, 5, 0, 513, 256], 2, 3, 16, 520)
    full = decode_attention(query, keys, values, lengths)
    more_keys, more_values = (torch.nn.functional.pad(kept, (0, 0, 0, 4000)) for kept in (keys, values))
    assert torch.equal(decode_attention(query, more_keys, more_values, lengths), full)
    for row in range(len(query)):
        part = slice(row, row + 1)
        assert torch.equal(decode_attention(query[part], keys[part], values[part], lengths[part].long()), full[part])
