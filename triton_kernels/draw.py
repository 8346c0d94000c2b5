"""Sample a token from each row of logits with the Gumbel-max trick, over a vocabulary that may be sharded over ranks.

argmax_v  x_v / T - log E_v    with E_v ~ Exp(1)    is a sample of softmax(x / T) (Gumbel-max; Yellott 1977). E_v is a pure function of the
row's key and the token's id in the WHOLE vocabulary, so the sampled token does not depend on the number of ranks or the rest of the batch.

    h = fmix32((v * 0x9E3779B1 + key_0) ^ key_1)   (MurmurHash3's finaliser)      u = (h + 1/2) / 2^32      E = -log(1 - u)

The winning E are small and would be lost in 1 - u, so log1p is used. If u rounds to 1, E is infinite and never wins.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from triton_kernels.aot import AotCase
from triton_kernels.launch import by_kernel, constexpr, jit, launch, tl
from triton_kernels.logprob import check_rows
from triton_kernels.shard import SEGMENTS, Shard

BLOCK = 1024
WARPS = 4
GOLDEN, MIX_1, MIX_2 = (constexpr(c - (1 << 32)) for c in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35))  # as int32
SCORE, ID = range(2)  # the rows of a segment's result, stored as int32 bits


def draw(
    logits_RV: Tensor,
    keys_R2: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    group: str = "",
    vocab_start: int = 0,
    vocab_valid: int | None = None,
) -> Tensor:
    """Sample one token id per row, int64 [R], equal on every rank of the group.

    logits_RV    [R, V], float, columns contiguous: this rank's ids vocab_start ... vocab_start + V (see logprob)
    keys_R2      [R, 2], int32: the random keys of a row; equal keys give equal noise
    temperature  0: greedy, the lowest id among equal logits
    top_k        sample from the k most probable tokens (and those tied with the last of them); 0: from all
    top_p        sample from the most probable tokens that together reach this probability (arXiv 1904.09751); 1: from all

    Raises ValueError for wrong dtypes and shapes, and for settings out of range.
    """
    check_rows(logits_RV, torch.zeros(len(logits_RV), dtype=torch.int64), 1.0)
    if keys_R2.dtype != torch.int32 or keys_R2.shape != (len(logits_RV), 2):
        raise ValueError(f"keys are {keys_R2.dtype} {tuple(keys_R2.shape)}; pass torch.int32 ({len(logits_RV)}, 2), a key for each row")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} and top_k={top_k} must not be negative, and top_p={top_p} must be in (0, 1]")
    shard = Shard.of(logits_RV.shape[1], group, vocab_start, vocab_valid)
    if temperature and (top_k or top_p < 1):
        floor_R = _floor(logits_RV, shard, temperature, top_k, top_p)
        logits_RV = logits_RV.masked_fill(logits_RV < floor_R[:, None], -torch.inf)
    parts = shard.gather(_best(logits_RV, keys_R2.contiguous(), shard, temperature))
    winner_R = parts[:, SCORE].view(torch.float32).argmax(0)  # ties: the first, which is the lowest id
    return parts[:, ID].gather(0, winner_R[None])[0].long()


def _floor(logits: Tensor, shard: Shard, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The smallest logit of each row that may be sampled, [R]. Gathers the whole vocabulary: top_k and top_p are meant for evaluation."""
    if shard.ranks > 1:
        shards = [torch.empty_like(logits) for _ in range(shard.ranks)]
        dist.all_gather(shards, logits.contiguous(), group=_resolve_process_group(shard.group))  # type: ignore[arg-type]
        logits = torch.cat(shards, 1)
    descending = logits[:, : shard.end - shard.first].float().sort(1, descending=True).values
    kept = torch.ones_like(descending, dtype=torch.bool)
    if top_k:
        kept[:, top_k:] = False
    if top_p < 1:
        p = (descending / temperature).softmax(1)
        kept &= p.cumsum(1) - p < top_p
    return descending.gather(1, kept.sum(1, keepdim=True) - 1)[:, 0]


def _best(logits: Tensor, keys: Tensor, shard: Shard, temperature: float) -> Tensor:
    """The score and id of the best token in each segment of this rank's columns, int32 [segments, 2, R]."""
    best = keys.new_empty((shard.segments, 2, len(logits)))
    inv_temp = 1 / temperature if temperature else 0.0
    if not by_kernel(logits):
        return _best_reference(best, logits, keys, shard, inv_temp)
    size, rest = divmod(shard.size, shard.segments)
    arguments = (best.view(torch.float32), best, logits, keys, logits.stride(0), len(logits), size, shard.start, shard.real, inv_temp)
    constants = {"REST": rest, "SEGMENTS": shard.segments, "GREEDY": not temperature, "BLOCK": BLOCK}
    launch(_best_kernel, (len(logits), shard.segments), *arguments, **constants, num_warps=WARPS)
    return best


def _best_reference(best: Tensor, logits: Tensor, keys: Tensor, shard: Shard, inv_temp: float) -> Tensor:
    scores = logits[:, : shard.real].float()
    if inv_temp:
        scores = scores * inv_temp - exponential(keys, shard.start, shard.real).log_()
    for segment, (left, right) in enumerate(zip(shard.borders, shard.borders[1:], strict=False)):
        if left < min(right, shard.real):
            score, column = scores[:, left:right].max(1)
            best[segment, SCORE], best[segment, ID] = score.view(torch.int32), (column + left + shard.start).int()
        else:
            best[segment, SCORE], best[segment, ID] = torch.tensor(-torch.inf).view(torch.int32), 0
    return best


def exponential(keys_R2: Tensor, start: int, count: int) -> Tensor:
    """E of the ids start ... start + count for each key, float32 [R, count]."""
    ids = torch.arange(start, start + count, dtype=torch.int32, device=keys_R2.device)
    h = (ids * GOLDEN.value + keys_R2[:, :1]) ^ keys_R2[:, 1:]
    h ^= (h >> 16) & 0xFFFF  # >> on int32 is arithmetic
    h *= MIX_1.value
    h ^= (h >> 13) & 0x7FFFF
    h *= MIX_2.value
    h ^= (h >> 16) & 0xFFFF
    u = h.float().mul_(2.0**-32).add_(2.0**-33)
    u += (u < 0).float()
    return u.neg_().log1p_().neg_()


@jit
def _exponential(id, key_0, key_1):
    """As `exponential`. Triton has no log1p: log1p(-u) = log(w) u / (1 - w) with w = 1 - u as rounded (Kahan)."""
    h = (id * GOLDEN + key_0) ^ key_1
    h ^= (h >> 16) & 0xFFFF
    h *= MIX_1
    h ^= (h >> 13) & 0x7FFFF
    h *= MIX_2
    h ^= (h >> 16) & 0xFFFF
    u = h.to(tl.float32) * (2.0**-32) + 2.0**-33
    u = tl.where(u < 0, u + 1.0, u)
    w = 1.0 - u
    return tl.where(w == 1.0, u, -tl.log(w) * (u / tl.where(w == 1.0, 1.0, 1.0 - w)))


@jit
def _best_kernel(
    SCORES, IDS, LOGITS, KEYS, stride, R, size, start, real, inv_temp,
    REST: tl.constexpr, SEGMENTS: tl.constexpr, GREEDY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of one segment; segments as in logprob."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    first = segment * size
    last = first + size
    if REST:
        first += segment * REST // SEGMENTS
        last += (segment + 1) * REST // SEGMENTS
    key_0 = tl.load(KEYS + 2 * row)
    key_1 = tl.load(KEYS + 2 * row + 1)
    best = -float("inf")
    best_id = 0
    for column in range(first, last, BLOCK):
        columns = column + tl.arange(0, BLOCK)
        score = tl.load(LOGITS + row * stride + columns, mask=columns < last, other=-float("inf")).to(tl.float32)
        if not GREEDY:
            score = score * inv_temp - tl.log(_exponential(columns + start, key_0, key_1))
        score = tl.where((columns < last) & (columns < real), score, -float("inf"))
        top, place = tl.max(score, 0, return_indices=True)  # type: ignore[misc]  # ties: the first
        if top > best:
            best = top
            best_id = column + place + start
    out = segment.to(tl.int64) * 2 * R + row
    tl.store(SCORES + out, best)
    tl.store(IDS + out + R, best_id)


def aot_cases() -> list[AotCase]:
    """Sampling and greedy, from fp32 logits."""
    pointers = {"SCORES": "*fp32", "IDS": "*i32", "LOGITS": "*fp32", "KEYS": "*i32"}
    integers = ("stride", "R", "size", "start", "real")
    cases = []
    for greedy in (False, True):
        constants = {"REST": 0, "SEGMENTS": SEGMENTS, "GREEDY": greedy, "BLOCK": BLOCK}
        signature = {**pointers, **dict.fromkeys(integers, "i32"), "inv_temp": "fp32", **dict.fromkeys(constants, "constexpr")}
        name = "draw greedy" if greedy else "draw"
        cases.append(AotCase(name, _best_kernel, signature, constants, (*pointers, *integers), num_warps=WARPS))
    return cases
