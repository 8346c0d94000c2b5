"""Generalized advantage estimation over packed sequences in one launch, with statistics for whitening; one program per sequence.

    delta_t = reward_t + gamma * value_next - value_t         advantage_t = delta_t + gamma * lam * advantage_next
    return_t = advantage_t + value_t

Schulman et al., arXiv 1506.02438, equation 16. "next" is the next token with mask 1; after the last one, value and advantage are 0.
Tokens with mask 0 (such as a tool's output within a response) are skipped, and their values are not read.

From right to left, each token maps the pair (value, advantage) of the next token to its own with an affine map,

    value' = keep * value + own         advantage' = decay * advantage + pull * value + gain

with keep 0, own value_t, decay gamma * lam, pull gamma, gain reward_t - value_t for mask 1, and the identity for mask 0. Composition of
affine maps is associative, so a block of tokens is one scan.
"""

from __future__ import annotations

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

BLOCK = 512  # tokens per scan; with 1024, each thread of four warps would need 160 registers


def gae(reward: Tensor, value: Tensor, mask: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages and returns of packed sequences, without gradient.

    reward     [T], float32 or bfloat16: reward of each token, in the units of the score
    value      [T], the same: the value model's prediction at each token, in the same units
    mask       [T], bool or uint8: 1 for the tokens to use
    cu_seqlens [S + 1], int32 or int64: sequence s is the tokens cu_seqlens[s] ... cu_seqlens[s + 1]. On the host (checked) or the GPU
    gamma, lam discount per token, and lambda of the bias-variance trade-off; both in [0, 1]

    Returns (advantage [T], returns [T], partials [3, S]), float32. Tokens with mask 0 get 0. partials is (n, mean, M2) of each
    sequence's advantages, where M2 is the sum of squared deviations from the mean; `merge_partials` merges them. Raises ValueError for
    wrong dtypes and shapes, for gamma or lam out of range and, if cu_seqlens is on the host, for descending cu_seqlens.
    """
    check_packed(mask, cu_seqlens, reward=reward, value=value)
    for name, setting in (("gamma", gamma), ("lam", lam)):
        if not 0 <= setting <= 1:
            raise ValueError(f"{name}={setting} must be in [0, 1]")
    return _gae(reward.detach(), value.detach(), mask, cu_seqlens, gamma, lam)


def merge_partials(partials_3S: Tensor) -> tuple[float, float, float]:
    """(n, mean, M2) of all tokens from those of each sequence; whiten with (advantage - mean) / sqrt(M2 / (n - 1)).

    Gather the partials of all microbatches and ranks [3, S] in the order of the samples and call this once: the result is then
    bitwise independent of how the batch was split; sequences without tokens change nothing. Chan, Golub & LeVeque 1979, equation 2.1, in
    float64 on the host, so it synchronizes with a GPU: once per optimizer step.
    """
    if partials_3S.dim() != 2 or len(partials_3S) != 3:
        raise ValueError(f"partials has shape {list(partials_3S.shape)}; it must be [3, S], the rows n, mean and M2")
    n = mean = m2 = 0.0
    for part_n, part_mean, part_m2 in partials_3S.T.tolist():
        if part_n:
            delta, total = part_mean - mean, n + part_n
            mean += delta * part_n / total
            m2 += part_m2 + delta * delta * n * part_n / total
            n = total
    return n, mean, m2


@operator("gae")
def _gae(reward: Tensor, value: Tensor, mask: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens = checked_cu_seqlens(cu_seqlens, reward)
    if not by_kernel(reward):
        return _reference(reward, value, mask, cu_seqlens, gamma, lam)
    advantage, returns, partials = _empty_results(reward, cu_seqlens)
    launch(
        _gae_kernel,
        (partials.shape[1],),
        reward.contiguous(),
        value.contiguous(),
        as_bytes(mask),
        cu_seqlens,
        advantage,
        returns,
        partials,
        partials.shape[1],
        gamma,
        gamma * lam,
        BLOCK=BLOCK,
    )
    return advantage, returns, partials


def _empty_results(reward: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    empty, dtype = reward.new_empty, result_dtype(reward)
    return empty(reward.shape, dtype=dtype), empty(reward.shape, dtype=dtype), empty(3, cu_seqlens.shape[0] - 1, dtype=dtype)


@_gae.register_fake
def _(reward: Tensor, value: Tensor, mask: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(reward, cu_seqlens)


def _reference(reward: Tensor, value: Tensor, mask: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    on, dtype = mask != 0, result_dtype(reward)
    own = torch.where(on, value.double(), 0.0)
    maps = (
        torch.where(on, 0.0, 1.0).double(),
        own,
        torch.where(on, gamma * lam, 1.0).double(),
        torch.where(on, gamma, 0.0).double(),
        torch.where(on, reward.double() - own, 0.0),
    )
    advantage = torch.where(on, _scan(torch.stack(maps), cu_seqlens)[4], 0.0)
    n_S = segment_sum(on, cu_seqlens)
    mean_S = segment_sum(advantage, cu_seqlens) / n_S.clamp(min=1)
    deviation = torch.where(on, advantage - mean_S[segment_of(cu_seqlens, len(reward))], 0.0)
    partials = torch.stack([n_S, mean_S, segment_sum(deviation**2, cu_seqlens)])
    return advantage.to(dtype), (advantage + own).to(dtype), partials.to(dtype)


def _scan(maps_5T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each token's map composed with those of all later tokens of its sequence, in log2(longest sequence) steps."""
    segment_T = segment_of(cu_seqlens, maps_5T.shape[1])
    longest = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    offset = 1
    while offset < longest:
        composed = _compose(maps_5T[:, offset:], maps_5T[:, :-offset])
        same = segment_T[offset:] == segment_T[:-offset]
        maps_5T = torch.cat([torch.where(same, composed, maps_5T[:, :-offset]), maps_5T[:, -offset:]], 1)
        offset *= 2
    return maps_5T


def _compose(first: Tensor, then: Tensor) -> Tensor:
    keep1, own1, decay1, pull1, gain1 = first
    keep2, own2, decay2, pull2, gain2 = then
    return torch.stack(
        [keep2 * keep1, keep2 * own1 + own2, decay2 * decay1, decay2 * pull1 + pull2 * keep1, decay2 * gain1 + pull2 * own1 + gain2]
    )


@jit
def _then(keep1, own1, decay1, pull1, gain1, keep2, own2, decay2, pull2, gain2):
    return keep2 * keep1, keep2 * own1 + own2, decay2 * decay1, decay2 * pull1 + pull2 * keep1, decay2 * gain1 + pull2 * own1 + gain2


@jit
def _gae_kernel(REWARD, VALUE, MASK, CU_SEQLENS, ADVANTAGE, RETURNS, PARTIALS, sequences, gamma, gamma_lam, BLOCK: tl.constexpr):
    """One program per sequence, from its last block to its first. Lane 0 of a block is its last token, so the scan runs forward."""
    s = tl.program_id(0)
    start, end = segment(CU_SEQLENS, s)
    lane = tl.arange(0, BLOCK)
    next_value, next_advantage = 0.0, 0.0
    n, mean, m2 = 0.0, 0.0, 0.0
    for done in range(0, end - start, BLOCK):
        t = end - 1 - done - lane
        inside = t >= start
        on = tl.load(MASK + t, mask=inside, other=0) != 0
        value = tl.load(VALUE + t, mask=on, other=0.0).to(tl.float32)
        gain = tl.load(REWARD + t, mask=on, other=0.0).to(tl.float32) - value
        count = on.to(tl.float32)
        maps = (1.0 - count, value, tl.where(on, gamma_lam, 1.0), tl.where(on, gamma, 0.0), gain)
        keep, own, decay, pull, gain = tl.associative_scan(maps, 0, _then)
        reached = decay * next_advantage + pull * next_value + gain
        advantage = tl.where(on, reached, 0.0)
        tl.store(ADVANTAGE + t, advantage, mask=inside)
        tl.store(RETURNS + t, advantage + value, mask=inside)
        last = lane == BLOCK - 1
        next_value = tl.sum(tl.where(last, keep * next_value + own, 0.0), 0)
        next_advantage = tl.sum(tl.where(last, reached, 0.0), 0)
        n, mean, m2 = _merge_block(advantage, count, n, mean, m2)
    tl.store(PARTIALS + s, n)
    tl.store(PARTIALS + sequences + s, mean)
    tl.store(PARTIALS + 2 * sequences + s, m2)


@jit
def _merge_block(advantage, count, n, mean, m2):
    """(n, mean, M2) with a block of tokens added; `advantage` is 0 where `count` is 0."""
    block_n = tl.sum(count, 0)
    block_mean = tl.sum(advantage, 0) / tl.maximum(block_n, 1.0)
    deviation = (advantage - block_mean) * count
    delta, total = block_mean - mean, tl.maximum(n + block_n, 1.0)
    m2 += tl.sum(deviation * deviation, 0) + delta * delta * n * block_n / total
    return n + block_n, mean + delta * block_n / total, m2


def aot_cases() -> list[AotCase]:
    """The configurations that this file launches."""
    results = dict.fromkeys(("ADVANTAGE", "RETURNS", "PARTIALS"), "*fp32")
    inputs = {"MASK": "*u8", "CU_SEQLENS": "*i32", "sequences": "i32", "gamma": "fp32", "gamma_lam": "fp32", "BLOCK": "constexpr"}
    pointers = ("REWARD", "VALUE", "MASK", "CU_SEQLENS", *results)
    return [
        AotCase(f"gae_{kind}", _gae_kernel, {"REWARD": f"*{kind}", "VALUE": f"*{kind}"} | inputs | results, {"BLOCK": BLOCK}, pointers, 4)
        for kind in ("fp32", "bf16")
    ]
