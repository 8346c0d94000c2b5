"""Sums of log-probs and token counts of packed sequences, in one launch; each sequence is summed in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_kernels.aot import AotCase
from triton_kernels.launch import by_kernel, jit, launch, tl
from triton_kernels.operator import operator
from triton_kernels.packed import (
    as_bytes,
    check_packed,
    checked_cu_seqlens,
    result_dtype,
    segment,
    segment_of,
    segment_sum,
)

BLOCK = 1024  # tokens that a program reads at a time


def seq_logps(logp: Tensor, mask: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Each sequence's sum of log-probs over tokens with mask 1, and their count; differentiable in `logp`.

    Arguments and errors are those of `dpo_norm`. Returns (sum [S], count [S]), float32. The count is 0 for a sequence without masked-in
    tokens, so that parts of a sequence on several ranks can be added; clamp it to 1 before dividing.
    """
    check_packed(mask, cu_seqlens, logp=logp)
    return _seq_logps(logp, mask, cu_seqlens)


@operator("seq_logps")
def _seq_logps(logp: Tensor, mask: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    cu_seqlens = checked_cu_seqlens(cu_seqlens, logp)
    if not by_kernel(logp):
        total_S, count_S = segment_sum(torch.where(mask != 0, logp, 0.0), cu_seqlens), segment_sum(mask != 0, cu_seqlens)
        return total_S.to(result_dtype(logp)), count_S.to(result_dtype(logp))
    total, count = _empty_sums(logp, cu_seqlens)
    launch(_sum_kernel, (len(total),), logp.contiguous(), as_bytes(mask), cu_seqlens, total, count, BLOCK=BLOCK)
    return total, count


def _empty_sums(logp: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    sequences = cu_seqlens.shape[0] - 1
    return logp.new_empty(sequences, dtype=result_dtype(logp)), logp.new_empty(sequences, dtype=result_dtype(logp))


@_seq_logps.register_fake
def _(logp: Tensor, mask: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_sums(logp, cu_seqlens)


@operator("seq_logps_backward")
def _seq_logps_backward(grad_S: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    cu_seqlens = cu_seqlens.to(mask.device).contiguous()
    if not by_kernel(mask):
        return torch.where(mask != 0, grad_S[segment_of(cu_seqlens, len(mask))], 0.0)
    grad = torch.empty(mask.shape, dtype=grad_S.dtype, device=mask.device)
    launch(_spread_kernel, (len(grad_S),), grad_S.contiguous(), as_bytes(mask), cu_seqlens, grad, BLOCK=BLOCK)
    return grad


@_seq_logps_backward.register_fake
def _(grad_S: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.empty_like(mask, dtype=grad_S.dtype)


def _save_segments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logp, mask, cu_seqlens = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(mask, cu_seqlens)
    ctx.dtype = logp.dtype


def _spread_backward(ctx: Any, grad_S: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _seq_logps_backward(grad_S, *ctx.saved_tensors).to(ctx.dtype), None, None


_seq_logps.register_autograd(_spread_backward, setup_context=_save_segments)


@jit
def _sum_kernel(LOGP, MASK, CU_SEQLENS, TOTAL, COUNT, BLOCK: tl.constexpr):
    """One program per sequence."""
    s = tl.program_id(0)
    start, end = segment(CU_SEQLENS, s)
    total, count = sum_and_count(LOGP, None, MASK, start, end, BLOCK)
    tl.store(TOTAL + s, total)
    tl.store(COUNT + s, count)


@jit
def _spread_kernel(GRAD_S, MASK, CU_SEQLENS, GRAD, BLOCK: tl.constexpr):
    """One program per sequence."""
    s = tl.program_id(0)
    spread(tl.load(GRAD_S + s), MASK, CU_SEQLENS, s, GRAD, BLOCK)


@jit
def sum_and_count(LOGP, REF_T, MASK, start, end, BLOCK: tl.constexpr):
    """Over the tokens of [start, end) with mask 1: (the sum of LOGP, minus REF_T if given; their count)."""
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        on = tl.load(MASK + t, mask=t < end, other=0) != 0
        logp = tl.load(LOGP + t, mask=on, other=0.0).to(tl.float32)
        if REF_T is not None:
            logp -= tl.load(REF_T + t, mask=on, other=0.0).to(tl.float32)
        total += logp
        count += on.to(tl.float32)
    return tl.sum(total, 0), tl.sum(count, 0)


@jit
def spread(value, MASK, CU_SEQLENS, s, OUT, BLOCK: tl.constexpr):
    """Writes `value` for the tokens of sequence `s` with mask 1, and 0 for the others."""
    start, end = segment(CU_SEQLENS, s)
    for first in range(start, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        on = tl.load(MASK + t, mask=t < end, other=0) != 0
        tl.store(OUT + t, tl.where(on, value, 0.0), mask=t < end)


def aot_cases() -> list[AotCase]:
    """The configurations that this file launches."""
    tokens = {"MASK": "*u8", "CU_SEQLENS": "*i32", "BLOCK": "constexpr"}
    sums = {"LOGP": "*fp32", "TOTAL": "*fp32", "COUNT": "*fp32"}
    grads = {"GRAD_S": "*fp32", "GRAD": "*fp32"}
    return [
        AotCase("seq_logps", _sum_kernel, sums | tokens, {"BLOCK": BLOCK}, ("LOGP", "MASK", "CU_SEQLENS", "TOTAL", "COUNT"), 4),
        AotCase("seq_logps_backward", _spread_kernel, grads | tokens, {"BLOCK": BLOCK}, ("GRAD_S", "MASK", "CU_SEQLENS", "GRAD"), 4),
    ]
