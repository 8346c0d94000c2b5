"""Decode attention: one new token per row attends to its row's cached keys and values, each row with its own length.

    out = softmax(q K^T / sqrt(size)) V     over the positions 0 ... length - 1

Positions are split into spans of SPAN, so that a few long rows keep a GPU busy too (Flash-Decoding, Dao et al. 2023; arXiv 2311.01282). A
program reads the keys and values of one span once, for all query heads that share them, with a running maximum (FlashAttention-2, arXiv
2307.08691). A second kernel merges a row's spans in order. Span borders are the same for every row, cache and batch, and spans beyond a
row's length are skipped, so the bits of a row depend only on its query, length, keys and values. No shape depends on a length and lengths
are never read on the host, so the launches can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.aot import AotCase
from triton_kernels.checks import check_device, check_float, check_like, check_shape
from triton_kernels.launch import by_kernel, constexpr, jit, launch, tl
from triton_kernels.tiles import parts, power_of_2

SPAN = 512  # positions per program; its partial sums are a few percent of the bytes of keys and values that it reads
TILE = 16384  # bytes of keys, and of values, that a program reads at a time
MERGED, MERGING_WARPS = 8, 4  # spans that are merged at a time
WARPS = {2: 4, 4: 8}  # by element size in bytes; with 4 warps float32 spills on sm_90
STAGES = 2  # the next tile is loaded during computation; more stages would reduce occupancy
LEAST = 16  # smallest tile dimension of matrix instructions
LOG2E = constexpr(1.4426950408889634)


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Row r of the queries attends to the first lengths[r] positions of slot r; not differentiable.

    query         [n, H, K], bfloat16, float16 or float32
    keys, values  [slots, KV, positions, K] of the same dtype, n <= slots; copied if a head's positions are not contiguous. H / KV
                  consecutive query heads share a KV head
    lengths       [n], int32 or int64, at most `positions` (not checked on a device); rows of length 0 read nothing

    Returns [n, H, K] of the query's dtype, accumulated in float32; 0 for length 0. Keys and values beyond a row's length must be finite.
    Raises ValueError for other shapes and dtypes.
    """
    _check(query, keys, values, lengths)
    if not by_kernel(query):
        return _reference(query, keys, values, lengths)
    if keys.stride() != values.stride() or keys.stride()[2:] != (query.shape[2], 1):
        keys, values = keys.contiguous(), values.contiguous()
    return _by_triton(query.contiguous(), keys, values, lengths.contiguous())


def _check(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    check_float(query=query, keys=keys)
    if query.dim() != 3 or keys.dim() != 4 or keys.shape[0] < query.shape[0] or keys.shape[1] == 0 or query.shape[1] % keys.shape[1]:
        raise ValueError(
            f"query has shape {list(query.shape)} and keys {list(keys.shape)}; use [n, heads, size] and [slots, heads, positions, size] "
            "with at least n slots, and heads that divide the query's"
        )
    query_type, keys_type = ((tensor.dtype, tensor.shape[-1]) for tensor in (query, keys))
    if query_type != keys_type:
        raise ValueError(
            f"query is {query_type[0]} with head size {query_type[1]}, keys {keys_type[0]} with head size {keys_type[1]}; make them equal"
        )
    check_like("values", values, "keys", keys)
    check_shape("lengths", lengths, (query.shape[0],), "one for each row")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths are {lengths.dtype}; use torch.int32 or torch.int64")
    for name, tensor in (("keys", keys), ("lengths", lengths)):
        check_device(name, tensor, "query", query)


def _reference(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """On the host, where lengths can be read: torch's kernel over as many positions as the longest row has."""
    n, heads, size = query.shape
    longest = int(lengths.max()) if n else 0
    if longest == 0:
        return torch.zeros_like(query)
    valid = (torch.arange(longest, device=query.device) < lengths[:, None])[:, None, None]
    grouped = query.view(n, keys.shape[1], -1, size)  # query heads of a KV head are adjacent: keys need no copies
    return F.scaled_dot_product_attention(grouped, keys[:n, :, :longest], values[:n, :, :longest], attn_mask=valid).reshape(n, heads, size)


@jit
def _spans_kernel(
    SUMS, STATS, QUERY, KEYS, VALUES, LENGTHS, slot_stride, head_stride, heads, spans, scale,
    GROUP: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One span of one row, for the GROUP query heads of one of `heads` KV heads. SUMS [GROUP, SIZE] are sums of values weighted by
    2^(score - maximum); STATS are the maximum and the sum of the weights. `scale` includes log2(e)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    span = tl.program_id(2)
    first = span * SPAN
    last = tl.minimum(first + SPAN, tl.load(LENGTHS + row).to(tl.int32))
    if first < last:
        member = tl.arange(0, ROWS)
        dim = tl.arange(0, WIDTH)[None, :]
        query_mask = (member[:, None] < GROUP) & (dim < SIZE)
        group = (row * heads + head) * GROUP + member
        query = tl.load(QUERY + group[:, None] * SIZE + dim, mask=query_mask, other=0.0)
        KEYS += row * slot_stride + head * head_stride
        VALUES += row * slot_stride + head * head_stride
        top = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(first, last, BLOCK):
            position = start + tl.arange(0, BLOCK)
            valid = position < last
            kv_mask = valid[:, None] & (dim < SIZE)
            keys = tl.load(KEYS + position[:, None] * SIZE + dim, mask=kv_mask, other=0.0)
            score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
            score = tl.where(valid[None, :], score, -float("inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            rescale = tl.exp2(top - higher)
            total = total * rescale + tl.sum(weight, 1)
            values = tl.load(VALUES + position[:, None] * SIZE + dim, mask=kv_mask, other=0.0)
            sums = sums * rescale[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
            top = higher
        part = group * spans + span
        tl.store(SUMS + part[:, None] * SIZE + dim, sums, mask=query_mask)
        tl.store(STATS + 2 * part, top, mask=member < GROUP)
        tl.store(STATS + 2 * part + 1, total, mask=member < GROUP)


@jit
def _merge_kernel(
    OUT, SUMS, STATS, LENGTHS, heads, spans, SIZE: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr, MERGED: tl.constexpr
):  # fmt: skip
    """Merges the spans of one row and query head in order, MERGED at a time."""
    row = tl.program_id(0).to(tl.int64)
    query = row * heads + tl.program_id(1)
    used = tl.cdiv(tl.load(LENGTHS + row).to(tl.int32), SPAN)
    dim = tl.arange(0, WIDTH)
    top = -float("inf")
    total = 0.0
    sums = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, used, MERGED):
        span = first + tl.arange(0, MERGED)
        part = query * spans + span
        tops = tl.load(STATS + 2 * part, mask=span < used, other=-float("inf"))
        totals = tl.load(STATS + 2 * part + 1, mask=span < used, other=0.0)
        partial = tl.load(SUMS + part[:, None] * SIZE + dim[None, :], mask=(span < used)[:, None] & (dim < SIZE)[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        rescale = tl.exp2(top - higher)
        scales = tl.exp2(tops - higher)
        total = total * rescale + tl.sum(totals * scales, 0)
        sums = sums * rescale + tl.sum(partial * scales[:, None], 0)
        top = higher
    out = sums / tl.where(used > 0, total, 1.0)
    tl.store(OUT + query * SIZE + dim, out.to(OUT.dtype.element_ty), mask=dim < SIZE)


def _by_triton(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    n, query_heads, size = query.shape
    heads, positions = keys.shape[1:3]
    spans, warps = parts(positions, SPAN), WARPS[query.element_size()]
    sums = query.new_empty((n, query_heads, spans, size), dtype=torch.float32)
    stats = query.new_empty((n, query_heads, spans, 2), dtype=torch.float32)
    tile = _tile(query_heads // heads, size, query.element_size())
    arguments = (query, keys, values, lengths, keys.stride(0), keys.stride(1), heads, spans, size**-0.5 * LOG2E.value)
    launch(_spans_kernel, (n, heads, spans), sums, stats, *arguments, **tile, num_warps=warps, num_stages=STAGES)
    out = torch.empty_like(query)
    launch(_merge_kernel, (n, query_heads), out, sums, stats, lengths, query_heads, spans, **_merged(tile), num_warps=MERGING_WARPS)
    return out


def _tile(group: int, size: int, width: int) -> dict[str, int]:
    """The constexprs of _spans_kernel for `group` query heads of size `size` and `width` bytes per element."""
    padded = max(LEAST, power_of_2(size))
    block = max(LEAST, min(128, TILE // (padded * width)))
    return {"GROUP": group, "SIZE": size, "SPAN": SPAN, "BLOCK": block, "ROWS": max(LEAST, power_of_2(group)), "WIDTH": padded}


def _merged(tile: dict[str, int]) -> dict[str, int]:
    """The constexprs of _merge_kernel after programs of `tile`."""
    return {name: tile[name] for name in ("SIZE", "SPAN", "WIDTH")} | {"MERGED": MERGED}


def aot_cases() -> list[AotCase]:
    """The heads of Llama 8B, of a tensor-parallel rank of 70B and 405B, and of SmolLM2; head size 96, which tiles pad; float32."""
    shapes = ((4, 128, "bf16"), (8, 128, "bf16"), (16, 128, "bf16"), (3, 64, "bf16"), (4, 96, "bf16"), (4, 128, "fp32"))
    kinds = dict.fromkeys((size, dtype) for _, size, dtype in shapes)
    return [*(_spans_case(*shape) for shape in shapes), *(_merge_case(*kind) for kind in kinds)]


def _spans_case(group: int, size: int, dtype: str) -> AotCase:
    width = 4 if dtype == "fp32" else 2
    pointers = _pointers() | dict.fromkeys(("QUERY", "KEYS", "VALUES"), f"*{dtype}")
    strides = ("slot_stride", "head_stride")
    signature = {**pointers, **dict.fromkeys((*strides, "heads", "spans"), "i32"), "scale": "fp32"}
    name, tile = f"decode_attention {group}x{size} {dtype}", _tile(group, size, width)
    return AotCase(name, _spans_kernel, signature, tile, (*pointers, *strides), WARPS[width], STAGES)


def _merge_case(size: int, dtype: str) -> AotCase:
    pointers = _pointers() | {"OUT": f"*{dtype}"}
    signature = pointers | dict.fromkeys(("heads", "spans"), "i32")
    name, tile = f"decode_attention merged {size} {dtype}", _merged(_tile(1, size, 2))
    return AotCase(name, _merge_kernel, signature, tile, tuple(pointers), MERGING_WARPS)


def _pointers() -> dict[str, str]:
    return {"SUMS": "*fp32", "STATS": "*fp32", "LENGTHS": "*i32"}
