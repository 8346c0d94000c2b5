"""Length-normalized DPO over packed sequences: one launch forward, one backward, no atomics.

    reward(y) = beta * mean_t log(pi / ref)         margin = reward(chosen) - reward(rejected)
    loss = -(1 - eps) * log sigmoid(margin) - eps * log sigmoid(-margin)

DPO is Rafailov et al., arXiv 2305.18290; the mean over tokens is Tülu 3's, arXiv 2411.15124, section 5; eps is the label smoothing of
conservative DPO. One program sums a pair in a fixed order, so a pair's results do not depend on its microbatch.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.aot import AotCase
from triton_kernels.launch import by_kernel, jit, launch, tl
from triton_kernels.operator import operator
from triton_kernels.packed import (
    as_bytes,
    check_floats,
    check_indices,
    check_packed,
    checked_cu_seqlens,
    checked_pairs,
    result_dtype,
    segment,
    segment_of,
    segment_sum,
)
from triton_kernels.seq_logps import spread, sum_and_count

BLOCK = 1024  # tokens that a program reads at a time
PAIR_BLOCK = 256  # entries of `pairs` that a program of the backward kernel compares at a time


class DpoMetrics(NamedTuple):
    """Metrics of each pair's implicit rewards, float32 [P], without gradient; rewards and margin are in nats."""

    chosen: Tensor  # reward of the chosen sequence
    rejected: Tensor  # reward of the rejected one
    margin: Tensor  # chosen - rejected
    accuracy: Tensor  # 1 if the margin is above 0, else 0


def dpo_norm(
    logp: Tensor,
    ref: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    *,
    ref_is: Literal["tokens", "sums"] = "tokens",
) -> tuple[Tensor, DpoMetrics]:
    """The loss of each pair, not averaged over pairs; differentiable only in `logp`.

    logp            [T], float32 or bfloat16: natural-log probability of each token under the policy
    ref             the same under the reference: [T] for every token, or [S], the sum over each sequence's masked-in tokens
    ref_is          which of the two `ref` is: "tokens" or "sums"; never inferred from the shape
    mask            [T], bool or uint8: 1 for the tokens to use; the log-probs of the others are not read
    cu_seqlens      [S + 1], int32 or int64: sequence s is the tokens cu_seqlens[s] ... cu_seqlens[s + 1]. On the host (checked) or the GPU
    pairs           [P, 2], int32 or int64: (chosen, rejected) as indices of sequences; a sequence may be in several. Host or GPU
    beta            the temperature of the implicit reward
    label_smoothing eps, the assumed fraction of pairs with a wrong preference label, in [0, 0.5)
    normalize       rewards are means over tokens with mask 1 (0 if there are none); False: sums, which is plain DPO

    Returns (loss [P], DpoMetrics of [P]), float32. Raises ValueError for wrong dtypes and shapes, and if the indices are on the host for
    descending cu_seqlens and pairs out of range; on the GPU these are not checked.
    """
    check_packed(mask, cu_seqlens, logp=logp)
    check_indices("pairs", pairs, ("P", 2), logp)
    if ref_is not in ("tokens", "sums"):
        raise ValueError(f"ref_is={ref_is!r} must be 'tokens' (ref is [T]) or 'sums' (ref is [S])")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 0.5); from 0.5 on the preferences would be reversed")
    shape, size = ("T", len(logp)) if ref_is == "tokens" else ("S", len(cu_seqlens) - 1)
    check_floats(shape, logp, size, ref=ref)
    loss_P, metrics_4P, _ = _dpo_norm(logp, ref, mask, cu_seqlens, pairs, beta, label_smoothing, normalize, ref_is == "sums")
    return loss_P, DpoMetrics(*metrics_4P.unbind())


@operator("dpo_norm")
def _dpo_norm(
    logp: Tensor,
    ref: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    beta: float,
    label_smoothing: float,
    normalize: bool,
    ref_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [P], metrics [4, P], slope [P, 2]): slope is d loss / d logp of every token with mask 1 of the pair's two sequences."""
    cu_seqlens = checked_cu_seqlens(cu_seqlens, logp)
    pairs = checked_pairs(pairs, len(cu_seqlens) - 1, logp)
    if not by_kernel(logp):
        return _reference(logp, ref, mask, cu_seqlens, pairs, (beta, label_smoothing, normalize, ref_sums))
    loss, metrics, slope = _empty_results(logp, pairs)
    ref_T, ref_S = (None, ref.contiguous()) if ref_sums else (ref.contiguous(), None)
    launch(
        _pair_kernel,
        (len(pairs),),
        logp.contiguous(),
        ref_T,
        ref_S,
        as_bytes(mask),
        cu_seqlens,
        pairs,
        loss,
        metrics,
        slope,
        len(pairs),
        beta,
        label_smoothing,
        NORMALIZE=normalize,
        BLOCK=BLOCK,
    )
    return loss, metrics, slope


def _empty_results(logp: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    empty = logp.new_empty
    dtype, count = result_dtype(logp), pairs.shape[0]
    return empty(count, dtype=dtype), empty(4, count, dtype=dtype), empty(count, 2, dtype=dtype)


@_dpo_norm.register_fake
def _(logp: Tensor, ref: Tensor, mask: Tensor, cu_seqlens: Tensor, pairs: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(logp, pairs)


@operator("dpo_norm_backward")
def _dpo_norm_backward(grad_loss: Tensor, slope: Tensor, mask: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> Tensor:
    """d loss / d logp [T]. Each sequence sums over all pairs that contain it, so no two programs write the same token."""
    cu_seqlens, pairs = cu_seqlens.to(mask.device).contiguous(), pairs.to(mask.device).contiguous()
    sequences = len(cu_seqlens) - 1
    if not by_kernel(mask):
        part_P2 = slope * grad_loss[:, None]
        grad_S = slope.new_zeros(sequences).index_add_(0, pairs.flatten(), part_P2.flatten())
        return torch.where(mask != 0, grad_S[segment_of(cu_seqlens, len(mask))], 0.0)
    grad = torch.empty(mask.shape, dtype=slope.dtype, device=mask.device)
    launch(
        _pair_backward_kernel,
        (sequences,),
        grad_loss.contiguous(),
        slope,
        pairs,
        as_bytes(mask),
        cu_seqlens,
        grad,
        pairs.numel(),
        PAIR_BLOCK=PAIR_BLOCK,
        BLOCK=BLOCK,
    )
    return grad


@_dpo_norm_backward.register_fake
def _(grad_loss: Tensor, slope: Tensor, mask: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> Tensor:
    return torch.empty_like(mask, dtype=slope.dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logp, _, mask, cu_seqlens, pairs, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2], mask, cu_seqlens, pairs)
    ctx.dtype = logp.dtype


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (_dpo_norm_backward(grad_loss, *ctx.saved_tensors).to(ctx.dtype), *[None] * 8)


_dpo_norm.register_autograd(_backward, setup_context=_save_for_backward)


def _reference(
    logp: Tensor, ref: Tensor, mask: Tensor, cu_seqlens: Tensor, pairs: Tensor, settings: tuple[float, float, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    beta, label_smoothing, normalize, ref_sums = settings
    ratio_T = logp.double() if ref_sums else logp.double() - ref.double()
    ratio_S = segment_sum(torch.where(mask != 0, ratio_T, 0.0), cu_seqlens) - (ref.double() if ref_sums else 0.0)
    count_S = segment_sum(mask != 0, cu_seqlens).clamp(min=1.0) if normalize else torch.ones_like(ratio_S)
    reward_P2 = beta * (ratio_S / count_S)[pairs]
    margin = reward_P2[:, 0] - reward_P2[:, 1]
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    slope = beta * (label_smoothing * torch.sigmoid(margin) - (1 - label_smoothing) * torch.sigmoid(-margin))
    slope_P2 = torch.stack([slope, -slope], 1) / count_S[pairs]
    dtype = result_dtype(logp)
    return loss.to(dtype), torch.stack([*reward_P2.unbind(1), margin, margin > 0]).to(dtype), slope_P2.to(dtype)


@jit
def _pair_kernel(
    LOGP,
    REF_T,
    REF_S,
    MASK,
    CU_SEQLENS,
    PAIRS,
    LOSS,
    METRICS,
    SLOPE,
    pairs,
    beta,
    label_smoothing,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per pair."""
    p = tl.program_id(0)
    chosen, chosen_count = _log_ratio(LOGP, REF_T, REF_S, MASK, CU_SEQLENS, tl.load(PAIRS + 2 * p), NORMALIZE, BLOCK)
    rejected, rejected_count = _log_ratio(LOGP, REF_T, REF_S, MASK, CU_SEQLENS, tl.load(PAIRS + 2 * p + 1), NORMALIZE, BLOCK)
    margin = beta * chosen - beta * rejected
    e = tl.exp(-tl.abs(margin))  # at most 1: no overflow, and neither sigmoid is computed as a difference
    tail = _log1p(e)
    right = tl.maximum(-margin, 0.0) + tail  # -log sigmoid(margin)
    wrong = tl.maximum(margin, 0.0) + tail  # -log sigmoid(-margin)
    above = tl.where(margin >= 0, 1.0, e) / (1.0 + e)  # sigmoid(margin)
    below = tl.where(margin >= 0, e, 1.0) / (1.0 + e)  # sigmoid(-margin)
    slope = beta * (label_smoothing * above - (1.0 - label_smoothing) * below)
    tl.store(LOSS + p, (1.0 - label_smoothing) * right + label_smoothing * wrong)
    tl.store(SLOPE + 2 * p, slope / chosen_count)
    tl.store(SLOPE + 2 * p + 1, -slope / rejected_count)
    tl.store(METRICS + p, beta * chosen)
    tl.store(METRICS + pairs + p, beta * rejected)
    tl.store(METRICS + 2 * pairs + p, margin)
    tl.store(METRICS + 3 * pairs + p, (margin > 0).to(tl.float32))


@jit
def _log_ratio(LOGP, REF_T, REF_S, MASK, CU_SEQLENS, s, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr):
    """log(pi / ref) of sequence `s` and its divisor: (mean, count), or (sum, 1) without NORMALIZE."""
    start, end = segment(CU_SEQLENS, s)
    total, count = sum_and_count(LOGP, REF_T, MASK, start, end, BLOCK)
    if REF_S is not None:
        total -= tl.load(REF_S + s).to(tl.float32)
    divisor = tl.maximum(count, 1.0) if NORMALIZE else 1.0
    return total / divisor, divisor


@jit
def _log1p(e):
    """log(1 + e) for e in [0, 1] to 2 ulp, as 2 atanh(e / (2 + e)): log(1 + e) itself loses all digits of a small e."""
    s = e / (2.0 + e)
    z = s * s
    series = 1.0 / 11 + z * (1.0 / 13 + z * (1.0 / 15))
    series = 1.0 / 5 + z * (1.0 / 7 + z * (1.0 / 9 + z * series))
    return 2.0 * s * (1.0 + z * (1.0 / 3 + z * series))


@jit
def _pair_backward_kernel(GRAD_LOSS, SLOPE, PAIRS, MASK, CU_SEQLENS, GRAD, entries, PAIR_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    """One program per sequence; `entries` is 2 P."""
    s = tl.program_id(0)
    part = tl.zeros((PAIR_BLOCK,), tl.float32)
    for first in range(0, entries, PAIR_BLOCK):
        j = first + tl.arange(0, PAIR_BLOCK)
        named = tl.load(PAIRS + j, mask=j < entries, other=-1) == s
        part += tl.load(SLOPE + j, mask=named, other=0.0) * tl.load(GRAD_LOSS + j // 2, mask=named, other=0.0)
    spread(tl.sum(part, 0), MASK, CU_SEQLENS, s, GRAD, BLOCK)


def aot_cases() -> list[AotCase]:
    """The configurations that this file launches."""
    common = {"MASK": "*u8", "CU_SEQLENS": "*i32", "PAIRS": "*i64", "SLOPE": "*fp32", "BLOCK": "constexpr"}
    pointers = ("LOGP", "MASK", "CU_SEQLENS", "PAIRS", "LOSS", "METRICS", "SLOPE")
    forward = common | {
        "LOSS": "*fp32",
        "METRICS": "*fp32",
        "pairs": "i32",
        "beta": "fp32",
        "label_smoothing": "fp32",
        "NORMALIZE": "constexpr",
    }
    constants = {"NORMALIZE": True, "BLOCK": BLOCK}
    cases = [
        AotCase(
            f"dpo_norm_{ref}_{kind}",
            _pair_kernel,
            forward | {"LOGP": f"*{kind}", "REF_T": "constexpr", "REF_S": "constexpr", ref: f"*{kind}"},
            constants | {name: None for name in ("REF_T", "REF_S") if name != ref},
            (*pointers, ref),
            num_warps=4,
        )
        for ref in ("REF_T", "REF_S")
        for kind in ("fp32", "bf16")
    ]
    backward = common | {"GRAD_LOSS": "*fp32", "GRAD": "*fp32", "entries": "i32", "PAIR_BLOCK": "constexpr"}
    divisible = ("GRAD_LOSS", "SLOPE", "PAIRS", "MASK", "CU_SEQLENS", "GRAD")
    blocks = {"PAIR_BLOCK": PAIR_BLOCK, "BLOCK": BLOCK}
    return [*cases, AotCase("dpo_norm_backward", _pair_backward_kernel, backward, blocks, divisible, num_warps=4)]
