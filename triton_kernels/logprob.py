"""log p(target), entropy and logsumexp of rows of logits in fp32, forward and backward, over a vocabulary that may be sharded over ranks.

x = inv_temp * logits        lse = log(sum_v exp x_v)        logp = x_target - lse        entropy = -sum_v p_v log p_v

A row is reduced in fixed segments of the vocabulary (triton_kernels/shard.py): per segment the maximum m, the sum s of exp(x - m), the
target's logit, and w = sum of exp(x - m) (x - m). One all-gather collects the segments of all ranks, and they are merged in order:

    M = max m_i    S = sum_i s_i e_i    W = sum_i (w_i + (m_i - M) s_i) e_i    with e_i = exp(m_i - M)
    logp = (x_target - M) - log S       entropy = log S - W / S                lse = M + log S

All terms are relative to the maximum, so nothing cancels, however large the logits. The gradient, for upstream g, h, l:

    d/dlogits_v = inv_temp * (g [v = target] + p_v (l - g - h (log p_v + entropy)))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from triton_kernels.aot import AotCase
from triton_kernels.launch import by_kernel, constexpr, jit, launch, tl
from triton_kernels.operator import operator
from triton_kernels.shard import SEGMENTS, Shard

LOWEST = constexpr(-3.4028234663852886e38)  # of float32: the maximum of an empty segment, finite so that differences to it are not NaN
LOG2E = constexpr(1.4426950408889634)
BLOCK = 4096  # columns at a time: no spills, and 16032 (an eighth of Llama 3's vocabulary) is nearly a multiple
WARPS = 4
GRADS_WARPS = 8  # with 4, rows of odd width spill on sm_100
AHEAD = 3  # blocks of columns in flight: 32 KiB of fp32
MERGED = 256  # rows that one program merges
IN_CACHE = 1 << 18  # logits that the reference processes at a time, to fit in cache

# The rows of `stats` [5, N]: the results, and what only backward needs (TOP is the maximum of the logits, not of x).
LOGP, ENTROPY, LSE, TOP, LOG_SUM = range(5)


def logprob(
    logits_NV: Tensor,
    target_N: Tensor,
    *,
    group: str = "",
    vocab_start: int = 0,
    vocab_valid: int | None = None,
    inv_temp: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probability of each row's target in nats, differentiable in `logits_NV`.

    logits_NV   [N, V], float32, bfloat16 or float16, columns contiguous, any row stride: this rank's ids vocab_start ... vocab_start + V
    target_N    [N], int64 ids of the whole vocabulary
    group       name of the process group over which the vocabulary is sharded, in rank order; "": not sharded
    vocab_valid ids from this one on are padding: probability 0, gradient 0. None: no padding
    inv_temp    1 / temperature, > 0

    Returns (logp_N, entropy_N or None, lse_N), float32, bitwise equal for 1, 2, 4 and 8 ranks. A row without a finite logit is NaN.
    Raises ValueError for wrong dtypes and shapes, and in host memory for a target outside the vocabulary. On a device, where this check
    would synchronize, that row's logp is NaN.
    """
    check_rows(logits_NV, target_N, inv_temp)
    stats = _logprob(logits_NV, target_N, group, vocab_start, vocab_valid, inv_temp, entropy)
    return stats[LOGP], stats[ENTROPY] if entropy else None, stats[LSE]


def check_rows(logits: Tensor, target: Tensor, inv_temp: float) -> None:
    """Raises ValueError unless `logits` [N, V], `target` [N] and `inv_temp` are valid arguments of logprob."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits are {logits.dtype}; use float32, bfloat16 or float16")
    if logits.ndim != 2 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(f"logits have shape {tuple(logits.shape)} and strides {logits.stride()}; pass [N, V] with contiguous columns")
    check_target(target, len(logits), inv_temp)


def check_target(target: Tensor, rows: int, inv_temp: float) -> None:
    """Raises ValueError unless `target` is int64 [rows] and `inv_temp` is positive."""
    if target.dtype != torch.int64 or target.shape != (rows,):
        raise ValueError(f"target is {target.dtype} {tuple(target.shape)}; pass torch.int64 ({rows},), an id for each row")
    if not inv_temp > 0:
        raise ValueError(f"inv_temp={inv_temp} must be positive: 1 / temperature")


@operator("logprob")
def _logprob(
    logits: Tensor, target: Tensor, group: str, vocab_start: int, vocab_valid: int | None, inv_temp: float, entropy: bool
) -> Tensor:
    shard = Shard.of(logits.shape[1], group, vocab_start, vocab_valid)
    shard.check(target)
    stats = logits.new_empty((5, len(target)), dtype=torch.float32)
    write_stats(stats, logits, target, shard, inv_temp, entropy)
    return stats


@_logprob.register_fake
def _(logits: Tensor, target: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((5, target.shape[0]), dtype=torch.float32)


@operator("logprob_backward")
def _logprob_backward(
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    grad_stats: Tensor,
    group: str,
    vocab_start: int,
    vocab_valid: int | None,
    inv_temp: float,
    entropy: bool,
) -> Tensor:
    shard = Shard.of(logits.shape[1], group, vocab_start, vocab_valid)
    grad = logits.new_empty(logits.shape)
    write_grads(grad, logits, target, stats, grad_stats.contiguous(), shard, inv_temp, entropy)
    return grad


@_logprob_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, *ctx.settings = inputs
    ctx.save_for_backward(logits, target, output)


def _backward(ctx: Any, grad_stats: Tensor) -> Any:
    return _logprob_backward(*ctx.saved_tensors, grad_stats, *ctx.settings), *[None] * 6


_logprob.register_autograd(_backward, setup_context=_setup)


def write_stats(stats: Tensor, logits: Tensor, target: Tensor, shard: Shard, inv_temp: float, entropy: bool) -> None:
    """Fill `stats` [5, n] (a slice of columns of [5, N]) for n rows of logits. All ranks of the shard's group must call it."""
    merge_parts(stats, shard.gather(segment_parts(logits, target, shard, inv_temp, entropy)), target, shard, inv_temp, entropy)


def merge_parts(stats: Tensor, parts: Tensor, target: Tensor, shard: Shard, inv_temp: float, entropy: bool) -> None:
    """Fill `stats` [5, n] from the `parts` [segments, 3 or 4, n] of the whole vocabulary, see segment_parts."""
    if not by_kernel(parts):
        _merge_reference(stats, parts, inv_temp, entropy)
        return
    arguments = (stats, parts, target.contiguous(), stats.stride(0), len(target), shard.first, shard.end, inv_temp)
    _launch(_merge_kernel, (-(-len(target) // MERGED),), *arguments, PARTS=len(parts), ENTROPY=entropy, BLOCK=MERGED)


def segment_parts(logits: Tensor, target: Tensor, shard: Shard, inv_temp: float, entropy: bool) -> Tensor:
    """This rank's segments of the softmax, [segments, 3 or 4, n]: maximum, sum of exp, target's logit, and with entropy w."""
    if not by_kernel(logits):
        return _parts_reference(logits, target, shard, inv_temp, entropy)
    parts = logits.new_empty((shard.segments, 4 if entropy else 3, len(target)), dtype=torch.float32)
    size, rest = divmod(shard.size, shard.segments)
    arguments = (parts, logits, target.contiguous(), logits.stride(0), len(target), size, shard.start, shard.real, inv_temp)
    constants = {"REST": rest, "SEGMENTS": shard.segments, "ENTROPY": entropy, "BLOCK": _block(shard.widest)}
    constants["STAGES"] = _stages(logits.stride(0), size, rest)
    _launch(_parts_kernel, (len(target), shard.segments), *arguments, **constants)
    return parts


def write_grads(
    grad: Tensor, logits: Tensor, target: Tensor, stats: Tensor, grad_stats: Tensor, shard: Shard, inv_temp: float, entropy: bool
) -> None:
    """Fill `grad` [n, V] with the gradient of logits [n, V]; they may be the same memory. stats, grad_stats: columns of [5, N]."""
    if not by_kernel(logits):
        _grads_reference(grad, logits, target, stats, grad_stats, shard, inv_temp, entropy)
        return
    block = _block(shard.size)
    strides = (grad.stride(0), logits.stride(0), stats.stride(0), grad_stats.stride(0))
    arguments = (grad, logits, target.contiguous(), stats, grad_stats, *strides, shard.size, shard.start, shard.real, inv_temp)
    _launch(_grads_kernel, (len(target), -(-shard.size // block)), *arguments, ENTROPY=entropy, BLOCK=block)


def _warps(kernel: Any) -> int:
    return GRADS_WARPS if kernel is _grads_kernel else WARPS


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    launch(kernel, grid, *arguments, **constants, num_warps=_warps(kernel))


def _stages(stride: int, size: int, rest: int) -> int:
    """Pipeline stages of loading column blocks, for segments of `size` columns, or one more in `rest` of them.

    1 if segments are not 16-byte aligned: elements would be loaded one by one and take twice the registers. Segments are the same for 1,
    2, 4 and 8 ranks, and so is this number.
    """
    return AHEAD if stride % 16 == 0 and size % 16 == 0 and rest == 0 else 1


def _block(columns: int) -> int:
    return min(BLOCK, max(128, 1 << (columns - 1).bit_length()))


def _cache_blocks(logits: Tensor, shard: Shard) -> Iterator[tuple[int, slice, slice]]:
    """(segment, rows, columns) of blocks of logits that fit in the CPU cache; padding columns are left out."""
    height = max(1, IN_CACHE // max(1, shard.widest))
    for top in range(0, len(logits), height):
        for segment, (left, right) in enumerate(pairwise(shard.borders)):
            if left < min(right, shard.real):
                yield segment, slice(top, min(top + height, len(logits))), slice(left, min(right, shard.real))


def _parts_reference(logits: Tensor, target: Tensor, shard: Shard, inv_temp: float, entropy: bool) -> Tensor:
    parts = logits.new_zeros((shard.segments, 4 if entropy else 3, len(target)), dtype=torch.float32)
    lowest = torch.finfo(torch.float32).min
    parts[:, 0] = lowest
    for segment, rows, columns in _cache_blocks(logits, shard):
        x = logits[rows, columns].float()
        top = x.amax(1).clamp_min(lowest)
        exps = (x - top[:, None]).mul_(inv_temp).exp_()
        parts[segment, 0, rows] = top
        parts[segment, 1, rows] = exps.sum(1)
        if entropy:
            parts[segment, 3, rows] = torch.special.entr(exps).sum(1).neg_()
    inside, column = shard.local(target)
    parts[0, 2] = torch.where(inside, logits.gather(1, column[:, None])[:, 0].float(), 0.0)  # the other segments add 0
    return parts


def _merge_reference(stats: Tensor, parts: Tensor, inv_temp: float, entropy: bool) -> None:
    stats[TOP] = parts[:, 0].amax(0)
    total, chosen, weighted = torch.zeros(3, stats.shape[1])
    for part in parts:
        below = (part[0] - stats[TOP]) * inv_temp
        scale = below.exp()
        total += part[1] * scale
        chosen += part[2]
        if entropy:
            weighted += torch.where(scale > 0, (part[3] + below * part[1]) * scale, 0.0)
    stats[LOG_SUM] = total.log()
    stats[LOGP] = (chosen - stats[TOP]) * inv_temp - stats[LOG_SUM]
    stats[ENTROPY] = stats[LOG_SUM] - weighted / total if entropy else 0.0
    stats[LSE] = stats[TOP] * inv_temp + stats[LOG_SUM]


def _grads_reference(
    grad: Tensor, logits: Tensor, target: Tensor, stats: Tensor, grad_stats: Tensor, shard: Shard, inv_temp: float, entropy: bool
) -> None:
    inside, column = shard.local(target)
    chosen = torch.where(inside, grad_stats[LOGP], 0.0)
    grad[:, shard.real :] = 0.0
    for _, rows, columns in _cache_blocks(logits, shard):
        log_p = (logits[rows, columns].float() - stats[TOP, rows, None]).mul_(inv_temp).sub_(stats[LOG_SUM, rows, None])
        p = log_p.exp()
        slope = (grad_stats[LSE, rows] - grad_stats[LOGP, rows])[:, None]
        if entropy:
            centered = log_p.masked_fill_(p == 0, 0.0).add_(stats[ENTROPY, rows, None])
            slope = slope - centered.mul_(grad_stats[ENTROPY, rows, None])
        p.mul_(slope)
        in_block = (column[rows] >= columns.start) & (column[rows] < columns.stop)
        place = torch.where(in_block, column[rows] - columns.start, 0)
        p.scatter_add_(1, place[:, None], torch.where(in_block, chosen[rows], 0.0)[:, None])
        grad[rows, columns] = p.mul_(inv_temp)


@jit
def _parts_kernel(
    PARTS, LOGITS, TARGET, stride, N, size, start, real, inv_temp,
    REST: tl.constexpr, SEGMENTS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per row and segment. A segment has `size` columns; the REST remaining columns are spread over SEGMENTS."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    first = segment * size
    last = first + size
    if REST:
        first += segment * REST // SEGMENTS
        last += (segment + 1) * REST // SEGMENTS
    LOGITS += row * stride
    scale = inv_temp * LOG2E
    top = LOWEST
    total = 0.0
    weighted = 0.0
    for column in tl.range(first, last, BLOCK, num_stages=STAGES):  # type: ignore[attr-defined]
        columns = column + tl.arange(0, BLOCK)
        x = tl.load(LOGITS + columns, mask=columns < last, other=-float("inf")).to(tl.float32)
        x = tl.where(columns < real, x, -float("inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        rescale = tl.exp2((top - higher) * scale)
        below = x - higher
        exps = tl.exp2(below * scale)
        if ENTROPY:  # exp(-inf) * -inf is NaN, but must be 0
            weighted = (weighted + (top - higher) * total) * rescale + tl.sum(tl.where(exps > 0, exps * below, 0.0), 0)
        total = total * rescale + tl.sum(exps, 0)
        top = higher
    target = tl.load(TARGET + row) - start
    chosen = tl.load(LOGITS + target, mask=(target >= first) & (target < last), other=0.0).to(tl.float32)
    PARTS += segment.to(tl.int64) * (4 if ENTROPY else 3) * N + row
    tl.store(PARTS, top)
    tl.store(PARTS + N, total)
    tl.store(PARTS + 2 * N, chosen)
    if ENTROPY:
        tl.store(PARTS + 3 * N, weighted * inv_temp)


@jit
def _merge_kernel(
    STATS, PARTS_IN, TARGET, stride, N, first, end, inv_temp, PARTS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    """Merges the segments of BLOCK rows in order."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = row < N
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    part = PARTS_IN + row
    for _ in tl.static_range(PARTS):  # type: ignore[attr-defined]
        top = tl.maximum(top, tl.load(part, mask=valid, other=0.0))
        part += (4 if ENTROPY else 3) * N
    total = tl.zeros((BLOCK,), tl.float32)
    chosen = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    part = PARTS_IN + row
    for _ in tl.static_range(PARTS):  # type: ignore[attr-defined]
        below = (tl.load(part, mask=valid, other=0.0) - top) * inv_temp
        scale = tl.exp2(below * LOG2E)
        exps = tl.load(part + N, mask=valid, other=1.0)
        total += exps * scale
        chosen += tl.load(part + 2 * N, mask=valid, other=0.0)
        if ENTROPY:
            weighted += tl.where(scale > 0, (tl.load(part + 3 * N, mask=valid, other=0.0) + below * exps) * scale, 0.0)
        part += (4 if ENTROPY else 3) * N
    log_sum = tl.log(total)
    target = tl.load(TARGET + row, mask=valid, other=0)
    known = (target >= first) & (target < end)
    STATS += row
    tl.store(STATS, tl.where(known, (chosen - top) * inv_temp - log_sum, float("nan")), mask=valid)
    tl.store(STATS + stride, log_sum - weighted / total if ENTROPY else weighted, mask=valid)
    tl.store(STATS + 2 * stride, top * inv_temp + log_sum, mask=valid)
    tl.store(STATS + 3 * stride, top, mask=valid)
    tl.store(STATS + 4 * stride, log_sum, mask=valid)


@jit
def _grads_kernel(
    GRAD, LOGITS, TARGET, STATS, GRAD_STATS, grad_stride, stride, stats_stride, grad_stats_stride, size, start, real, inv_temp,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row. A program reads before it writes, and only its own columns, so GRAD may be LOGITS."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(LOGITS + row * stride + columns, mask=columns < size, other=-float("inf")).to(tl.float32)
    STATS += row
    GRAD_STATS += row
    log_p = (x - tl.load(STATS + 3 * stats_stride)) * inv_temp - tl.load(STATS + 4 * stats_stride)
    p = tl.exp2(log_p * LOG2E)
    grad_logp = tl.load(GRAD_STATS)
    slope = tl.load(GRAD_STATS + 2 * grad_stats_stride) - grad_logp
    if ENTROPY:
        centered = tl.where(p > 0, log_p, 0.0) + tl.load(STATS + stats_stride)
        slope = slope - centered * tl.load(GRAD_STATS + grad_stats_stride)
    target = tl.load(TARGET + row) - start
    grad = (tl.where(columns == target, grad_logp, 0.0) + p * slope) * inv_temp
    grad = tl.where(columns < real, grad, 0.0)
    tl.store(GRAD + row * grad_stride + columns, grad.to(GRAD.dtype.element_ty), mask=columns < size)


def aot_cases() -> list[AotCase]:
    """The launches of logprob and linear_logprob: fp32 and bf16 logits, with and without entropy, aligned rows and rows of odd width."""
    kinds = [(entropy, aligned) for entropy in (False, True) for aligned in (True, False)]
    return [
        *(_parts_case(dtype, *kind) for kind in kinds for dtype in ("fp32", "bf16")),
        *(_merge_case(entropy) for entropy in (False, True)),
        *(_grads_case(*types, *kind) for kind in kinds for types in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"))),
    ]


def _parts_case(dtype: str, entropy: bool, aligned: bool) -> AotCase:
    pointers = {"PARTS": "*fp32", "LOGITS": f"*{dtype}", "TARGET": "*i64"}
    rest = 0 if aligned else 1
    constants = {"REST": rest, "SEGMENTS": SEGMENTS, "ENTROPY": entropy, "BLOCK": BLOCK, "STAGES": _stages(16, 16, rest)}
    case = _case(f"logprob parts {dtype}", _parts_kernel, pointers, ("stride", "N", "size", "start", "real"), constants, aligned)
    return replace(case, prefetches=aligned)


def _merge_case(entropy: bool) -> AotCase:
    pointers = {"STATS": "*fp32", "PARTS_IN": "*fp32", "TARGET": "*i64"}
    constants = {"PARTS": SEGMENTS, "ENTROPY": entropy, "BLOCK": MERGED}
    return _case("logprob merge", _merge_kernel, pointers, ("stride", "N", "first", "end"), constants, True)


def _grads_case(dtype: str, grad_dtype: str, entropy: bool, aligned: bool) -> AotCase:
    pointers = {"GRAD": f"*{grad_dtype}", "LOGITS": f"*{dtype}", "TARGET": "*i64", "STATS": "*fp32", "GRAD_STATS": "*fp32"}
    integers = ("grad_stride", "stride", "stats_stride", "grad_stats_stride", "size", "start", "real")
    name = f"logprob grads {dtype} to {grad_dtype}"
    return _case(name, _grads_kernel, pointers, integers, {"ENTROPY": entropy, "BLOCK": BLOCK}, aligned)


def _case(name: str, kernel: Any, pointers: dict[str, str], integers: tuple[str, ...], constants: dict[str, Any], aligned: bool) -> AotCase:
    signature = {**pointers, **dict.fromkeys(integers, "i32"), "inv_temp": "fp32", **dict.fromkeys(constants, "constexpr")}
    name += " entropy" * constants["ENTROPY"] + " odd" * (not aligned)
    return AotCase(name, kernel, signature, constants, (*pointers, *(integers if aligned else ())), num_warps=_warps(kernel))
