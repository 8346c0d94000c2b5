"""The clipped losses of PPO over tokens, with their gradients and five statistics, in one kernel.

    r = exp(logp - old_logp)        A = (advantage - mean) * rstd
    policy  = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
    loss    = sum_t weight_t * (policy + kl_coef * kl)                                                     of the policy
    value   = sum_t weight_t * max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) / 2             of a critic

Schulman et al., arXiv 1707.06347, equation 7; separate lower and upper clips are from DAPO, arXiv 2503.14476; the value loss is that of
Tülu 3's trainer. With x = ref_logp - logp the estimators of KL(policy, reference) are k1 = -x, k2 = x^2 / 2 and k3 = exp(x) - 1 - x
(Schulman 2020, joschu.net/blog/kl-approx.html). Log-ratios are clamped before exponentiation, and the gradient beyond is 0:
logp - old_logp to [-20, 20], x of k3 to at most 20.

Averaging is expressed as one float32 weight per token, from counts of the WHOLE batch, over microbatches and ranks:

    token mean           mask_t / number of tokens
    sequence mean        mask_t / (tokens of t's sequence * number of sequences)
    constant (Dr. GRPO)  mask_t / (longest response * number of sequences)

Tokens of weight 0 are ignored, whatever their values. Each block of tokens writes its partial sums, and the last block to finish adds those
of all blocks in order. This takes one launch and gives the same bits in every run: the integer atomic only decides which block is last.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from triton_kernels.aot import AotCase
from triton_kernels.launch import by_kernel, counter, jit, launch, tl
from triton_kernels.operator import operator
from triton_kernels.packed import check_floats, result_dtype
from triton_kernels.tiles import parts

BLOCK = 1024  # tokens per program
READ = 128  # partial sums of a statistic that the last program reads at a time
CUT = 20.0  # log-ratio beyond which exp is clamped

Kl = Literal["k1", "k2", "k3"]
Results = tuple[Tensor, Tensor, Tensor, Tensor]  # loss [], stats [5], and gradients of logp and value


class PpoStats(NamedTuple):
    """Sums over tokens of weight_t * (the quantity below), which can be added over microbatches and ranks like the loss.

    Scalars in float32, without gradient; 0 for terms with missing inputs.
    """

    loss: Tensor  # the returned loss
    policy: Tensor  # the clipped policy loss
    kl: Tensor  # KL(policy, reference) by the chosen estimator, in nats, without its coefficient
    clip_fraction: Tensor  # 1 if the clipped branch is larger, so that the token has no policy gradient
    approx_kl: Tensor  # KL(old policy, policy), r - 1 - log r, in nats: how far the policy has moved in this step


def ppo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    weight: Tensor,
    *,
    mean: float = 0.0,
    rstd: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logp: Tensor | None = None,
    kl: Kl = "k3",
    kl_coef: float = 0.0,
) -> tuple[Tensor, PpoStats]:
    """Weighted sum over tokens of the policy loss and the KL term; differentiable in `logp`.

    logp, old_logp, ref_logp    [T], float32 or bfloat16: natural-log probabilities of each token under the policy, the old policy
                                (the denominator of the ratio) and the reference (None: no KL term)
    advantage                   [T], not whitened
    weight                      [T], float32, see above
    mean, rstd                  for whitening advantages; from the n, mean and M2 of `merge_partials`, rstd = 1 / sqrt(M2 / (n - 1) + 1e-8)
    clip_low, clip_high         the ratio is clipped to [1 - clip_low, 1 + clip_high]

    Returns (loss [], PpoStats), float32. Raises ValueError for wrong dtypes and shapes, a KL term without a reference, and negative clips.
    """
    check_kl(kl, kl_coef, ref_logp, clip_low=clip_low, clip_high=clip_high)
    _check(weight, {"logp": logp, "old_logp": old_logp, "advantage": advantage, "ref_logp": ref_logp})
    settings = (mean, rstd, clip_low, clip_high, kl_coef, 0.0)
    loss, stats_5, *_ = _ppo(weight, logp, old_logp, advantage, ref_logp, None, None, None, *settings, kl)
    return loss, PpoStats(*stats_5.unbind())


def check_kl(kl: str, kl_coef: float, ref_logp: Tensor | None, **clips: float) -> None:
    """Raises ValueError for an unknown estimator, a KL term without a reference and a negative clip."""
    if kl not in get_args(Kl):
        raise ValueError(f"kl={kl!r} must be 'k1', 'k2' or 'k3'")
    if kl_coef and ref_logp is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logp; pass it or set kl_coef=0")
    for name, clip in clips.items():
        if clip < 0:
            raise ValueError(f"{name}={clip} must not be negative")


def policy_term(
    weight: Tensor,
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    ref_logp: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl: str,
    kl_coef: float,
) -> tuple[Tensor, Tensor]:
    """The policy and KL terms of `ppo_loss` alone, without autograd: (their sum [], its gradient in logp [T])."""
    loss, _, grad, _ = _ppo(weight, logp, old_logp, advantage, ref_logp, None, None, None, 0.0, 1.0, clip_low, clip_high, kl_coef, 0.0, kl)
    return loss, grad


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, weight: Tensor, *, clip: float = 0.2) -> Tensor:
    """The clipped value loss of a critic, a float32 scalar; differentiable in `value`.

    value, old_value, returns   [T], float32 or bfloat16: the critic's values, its values at rollout, and their targets
    weight                      [T], float32, as in `ppo_loss`

    Raises ValueError for wrong dtypes and shapes and a negative clip.
    """
    if clip < 0:
        raise ValueError(f"clip={clip} must not be negative")
    _check(weight, {"value": value, "old_value": old_value, "returns": returns})
    loss, *_ = _ppo(weight, None, None, None, None, value, old_value, returns, 0.0, 1.0, 0.0, 0.0, 0.0, clip, "k3")
    return loss


def _check(weight: Tensor, tensors: dict[str, Tensor | None]) -> None:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    check_floats("T", weight, weight.numel(), weight=weight, **given)
    if weight.dtype == torch.bfloat16:
        raise ValueError("weight is bfloat16, which is too coarse for token weights to add up to 1; pass float32")


@operator("ppo")
def _ppo(
    weight: Tensor,
    logp: Tensor | None,
    old_logp: Tensor | None,
    advantage: Tensor | None,
    ref_logp: Tensor | None,
    value: Tensor | None,
    old_value: Tensor | None,
    returns: Tensor | None,
    mean: float,
    rstd: float,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    value_clip: float,
    kl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], stats [5], d loss / d logp, d loss / d value): gradients are [T], or [0] for an input of None."""
    inputs = (logp, old_logp, advantage, ref_logp, value, old_value, returns)
    settings = (mean, rstd, clip_low, clip_high, kl_coef, value_clip)
    if not by_kernel(weight):
        return _reference(weight, inputs, settings, kl)
    loss, stats, *grads = results = _empty_results(weight, logp, value)
    blocks = max(1, parts(len(weight), BLOCK))  # one for no tokens, to write sums of 0
    given = (weight.contiguous(), *(None if tensor is None else tensor.contiguous() for tensor in inputs))
    grads = (None if tensor is None else grad for tensor, grad in zip((logp, value), grads, strict=True))
    outputs = (*grads, weight.new_empty(len(stats), blocks), loss, stats, counter(weight))
    launch(_kernel, (blocks,), *given, *outputs, len(weight), blocks, *settings, KL=kl, CUT=CUT, BLOCK=BLOCK, READ=READ)
    return results


def _empty_results(weight: Tensor, logp: Tensor | None, value: Tensor | None) -> Results:
    dtype = result_dtype(weight)
    logp, value = (weight.new_empty(0 if x is None else x.shape[0], dtype=dtype) for x in (logp, value))
    return weight.new_empty((), dtype=dtype), weight.new_empty(5, dtype=dtype), logp, value


@_ppo.register_fake
def _(weight: Tensor, *inputs: Any) -> Results:
    return _empty_results(weight, inputs[0], inputs[4])


def _save_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = [None if x is None else x.dtype for x in (inputs[1], inputs[5])]


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logp, value = (
        None if dtype is None else (grad_loss * grad).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return None, logp, None, None, None, value, None, None, *[None] * 7


_ppo.register_autograd(_backward, setup_context=_save_grads)


def _reference(weight: Tensor, inputs: tuple[Tensor | None, ...], settings: tuple[float, ...], kl: str) -> Results:
    logp, old_logp, advantage, ref_logp, value, old_value, returns = inputs
    mean, rstd, clip_low, clip_high, kl_coef, value_clip = settings

    def wide(tensor: Tensor | None) -> Tensor:
        return zero if tensor is None else torch.where(weight != 0, tensor.double(), 0.0)

    zero = torch.zeros_like(weight, dtype=torch.float64)
    policy = policy_slope = kl_term = kl_slope = value_term = value_slope = clipped = approx_kl = zero
    if logp is not None:
        whitened = (wide(advantage) - mean) * rstd
        log_ratio = wide(logp) - wide(old_logp)
        policy, policy_slope, clipped = clipped_policy(log_ratio, whitened, clip_low, clip_high)
        approx_kl, _ = _kl_reference(log_ratio.clamp(-CUT, CUT), "k3")
    if ref_logp is not None:
        kl_term, kl_slope = _kl_reference(wide(ref_logp) - wide(logp), kl)
    if value is not None:
        value_term, value_slope = _value_reference(wide(value), wide(old_value), wide(returns), value_clip)
    total = policy + kl_coef * kl_term + value_term
    stats_5 = torch.stack([total, policy, kl_term, clipped.double(), approx_kl]) @ weight.double()
    grads = (policy_slope + kl_coef * kl_slope, value_slope)
    grads = (weight.double() * grad if x is not None else zero.new_empty(0) for grad, x in zip(grads, (logp, value), strict=True))
    dtype = result_dtype(weight)
    grad_logp, grad_value = (grad.to(dtype) for grad in grads)
    return stats_5[0].to(dtype, copy=True), stats_5.to(dtype), grad_logp, grad_value


def clipped_policy(log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss of each token, its derivative in logp, whether the clipped branch is larger), from logp - old_logp."""
    cut = log_ratio.clamp(-CUT, CUT)
    ratio = cut.exp()
    free, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    slope = torch.where((free >= clipped) & (cut == log_ratio), free, 0.0)
    return torch.maximum(free, clipped), slope, clipped > free


def _kl_reference(x: Tensor, kl: str) -> tuple[Tensor, Tensor]:
    if kl == "k1":
        return -x, torch.ones_like(x)
    if kl == "k2":
        return x * x / 2, -x
    cut = x.clamp(max=CUT)
    return torch.expm1(cut) - cut, torch.where(x <= CUT, -torch.expm1(cut), 0.0)


def _value_reference(value: Tensor, old_value: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    error = value - returns
    clipped = old_value + (value - old_value).clamp(-clip, clip) - returns
    free = (value - old_value).abs() <= clip
    return torch.maximum(error**2, clipped**2) / 2, torch.where(free | (error**2 >= clipped**2), error, 0.0)


@jit
def _kernel(
    WEIGHT, LOGP, OLD_LOGP, ADVANTAGE, REF_LOGP, VALUE, OLD_VALUE, RETURNS,
    GRAD_LOGP, GRAD_VALUE, PARTIALS, LOSS, STATS, COUNTER, tokens, blocks,
    mean, rstd, clip_low, clip_high, kl_coef, value_clip,
    KL: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """One program per block of tokens: writes gradients, and sum i of block b to PARTIALS[i, b]. The last program adds the sums."""
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = t < tokens
    weight = tl.load(WEIGHT + t, mask=inside, other=0.0)
    on = weight != 0
    loss = tl.zeros((BLOCK,), tl.float32)
    policy_sum, kl_sum, clipped_sum, approx_kl_sum = 0.0, 0.0, 0.0, 0.0
    if LOGP is not None:
        logp = _read(LOGP, t, inside, on)
        advantage = (_read(ADVANTAGE, t, inside, on) - mean) * rstd
        policy, grad, clipped, approx_kl = _policy(logp - _read(OLD_LOGP, t, inside, on), advantage, clip_low, clip_high, CUT)
        loss += policy
        policy_sum, clipped_sum, approx_kl_sum = _sum(weight, policy), _sum(weight, clipped), _sum(weight, approx_kl)
        if REF_LOGP is not None:
            kl, slope = _kl(_read(REF_LOGP, t, inside, on) - logp, KL, CUT)
            loss += kl_coef * kl
            grad += kl_coef * slope
            kl_sum = _sum(weight, kl)
        tl.store(GRAD_LOGP + t, weight * grad, mask=inside)
    if VALUE is not None:
        value, grad = _value(_read(VALUE, t, inside, on), _read(OLD_VALUE, t, inside, on), _read(RETURNS, t, inside, on), value_clip)
        loss += value
        tl.store(GRAD_VALUE + t, weight * grad, mask=inside)
    sums = (_sum(weight, loss), policy_sum, kl_sum, clipped_sum, approx_kl_sum)
    for i in tl.static_range(5):
        tl.store(PARTIALS + i * blocks + tl.program_id(0), sums[i])
    tl.debug_barrier()  # all of this program's stores come before its release
    if tl.atomic_add(COUNTER, 1, sem="acq_rel") == blocks - 1:
        _add_up(PARTIALS, LOSS, STATS, blocks, READ)
        tl.store(COUNTER, 0)


@jit
def _read(POINTER, t, inside, on):
    """Values in float32, 0 for tokens of weight 0. The load is masked only by the block, so that aligned loads are 128 bits wide."""
    return tl.where(on, tl.load(POINTER + t, mask=inside, other=0.0).to(tl.float32), 0.0)


@jit
def _sum(weight, term):
    return tl.sum(weight * term, 0)


@jit
def _policy(log_ratio, advantage, clip_low, clip_high, CUT: tl.constexpr):
    """(loss, its derivative in logp, whether the clipped branch is larger, r - 1 - log r)."""
    cut = tl.minimum(tl.maximum(log_ratio, -CUT), CUT)
    ratio = tl.exp(cut)
    free = -advantage * ratio
    clipped = -advantage * tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
    slope = tl.where((free >= clipped) & (cut == log_ratio), free, 0.0)
    return tl.maximum(free, clipped), slope, (clipped > free).to(tl.float32), _exp_less_line(cut)


@jit
def _kl(x, KL: tl.constexpr, CUT: tl.constexpr):
    """(estimate, its derivative in logp), where x = ref_logp - logp."""
    if KL == "k1":
        return -x, tl.zeros_like(x) + 1.0
    elif KL == "k2":
        return 0.5 * x * x, -x
    else:
        cut = tl.minimum(x, CUT)
        k3 = _exp_less_line(cut)
        return k3, tl.where(x <= CUT, -(cut + k3), 0.0)


@jit
def _value(value, old_value, returns, clip):
    """(loss, its derivative in value). Within the clip range both branches are equal, and the unclipped one gives the derivative."""
    free = value - returns
    clipped = tl.minimum(tl.maximum(value, old_value - clip), old_value + clip) - returns
    return 0.5 * tl.maximum(free * free, clipped * clipped), tl.where(free * free >= clipped * clipped, free, 0.0)


@jit
def _exp_less_line(x):
    """exp(x) - 1 - x. For |x| < 1 from its series: the difference would lose all digits at x = 1e-4."""
    series = 1.0 / 5040 + x * (1.0 / 40320 + x * (1.0 / 362880 + x * (1.0 / 3628800 + x * (1.0 / 39916800))))
    series = 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * series))))
    return tl.where(tl.abs(x) < 1.0, x * x * series, tl.exp(x) - 1.0 - x)


@jit
def _add_up(PARTIALS, LOSS, STATS, blocks, READ: tl.constexpr):
    """Adds the partial sums of every statistic in the order of blocks. The first statistic is the loss."""
    i = tl.arange(0, 8)
    total = tl.zeros((8, READ), tl.float32)
    for first in range(0, blocks, READ):
        block = first + tl.arange(0, READ)
        inside = (i < 5)[:, None] & (block < blocks)[None, :]
        # From the cache that all share: others wrote them.
        total += tl.load(PARTIALS + i[:, None] * blocks + block[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    sums = tl.sum(total, 1)
    tl.store(STATS + i, sums, mask=i < 5)
    tl.store(LOSS + i, sums, mask=i == 0)


def aot_cases() -> list[AotCase]:
    """What this file ships: the policy loss with and without a reference, and the value loss."""
    floats = ("mean", "rstd", "clip_low", "clip_high", "kl_coef", "value_clip")
    scalars = dict.fromkeys(floats, "fp32") | {"tokens": "i32", "blocks": "i32"}
    constants = {"KL": "k3", "CUT": CUT, "BLOCK": BLOCK, "READ": READ}
    results = ("PARTIALS", "LOSS", "STATS")
    policy = ("LOGP", "OLD_LOGP", "ADVANTAGE", "GRAD_LOGP")
    value = ("VALUE", "OLD_VALUE", "RETURNS", "GRAD_VALUE")
    every = (*policy, *value, "REF_LOGP")
    shipped = {"policy": policy, "policy_kl": (*policy, "REF_LOGP"), "value": value}

    def case(name: str, present: tuple[str, ...]) -> AotCase:
        pointers = ("WEIGHT", *results, *present)
        absent = {name: None for name in every if name not in present}
        types = dict.fromkeys(pointers, "*fp32") | dict.fromkeys((*absent, *constants), "constexpr") | {"COUNTER": "*i32"}
        return AotCase(f"ppo_{name}", _kernel, types | scalars, constants | absent, (*pointers, "COUNTER", "tokens"), num_warps=4)

    return [case(name, present) for name, present in shipped.items()]
