"""A loss straight from hidden states, with its gradient made in the forward pass: three products, and no logits kept.

Where a loss is a sum over tokens, the slope of each token's term is known as soon as its log-prob is. A chunk's logits can then be
turned into their gradient, and that into those of hidden and weight, while they are at hand; backward only scales. For

    SFT    sum_t -w_t logp_t
    PPO    sum_t w_t max(-r_t A_t, -clip(r_t, 1 - clip_low, 1 + clip_high) A_t)    r_t = exp(logp_t - old_logp_t)

(Schulman et al., arXiv:1707.06347, eq. 7, with two clips). The weights w hold the mask and every normalisation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from triton_kernels.linear_logprob import Gradients, check_linear, chunks, logits_buffer, write_logits
from triton_kernels.logprob import LOGP, write_grads, write_stats
from triton_kernels.ppo import clipped_policy
from triton_kernels.shard import Shard


def linear_policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    token_weight_N: Tensor,
    *,
    old_logp_N: Tensor | None = None,
    advantage_N: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    rows: Tensor | None = None,
    group: str = "",
    vocab_start: int = 0,
    vocab_valid: int | None = None,
    inv_temp: float = 1.0,
    chunk: int = 4096,
    logits_dtype: torch.dtype = torch.float32,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum over tokens of a loss, differentiable in `hidden_ND` and `weight_VD`, and the log-probs it was made of.

    token_weight_N  [N], float32: w; tokens of weight 0 do not count, whatever else is said of them
    old_logp_N      [N], float32, with advantage_N [N]: PPO's clipped loss. Both None: negative log-likelihood
    rows            [M], int64: the rows that count; the others cost nothing, and their log-prob is 0. None: all

    The rest as of linear_logprob, which see. Returns (total, float32 scalar; logp_N, float32, cut off from autograd). A log-ratio is
    held within ±20. ValueError for wrong types and shapes.
    """
    check_linear(hidden_ND, weight_VD, target_N, inv_temp, chunk, logits_dtype, weight_grad)
    _check_tokens(len(target_N), {"token_weight": token_weight_N, "old_logp": old_logp_N, "advantage": advantage_N})
    tokens = [hidden_ND, target_N, token_weight_N, old_logp_N, advantage_N]
    if rows is not None:
        tokens = [None if each is None else each.index_select(0, rows) for each in tokens]
    hidden, *others = tokens
    needs = [torch.is_grad_enabled() and each.requires_grad for each in (hidden_ND, weight_VD)]
    how = (clip_low, clip_high, group, vocab_start, vocab_valid, inv_temp, chunk, logits_dtype, *needs)
    total, logp, _, _ = _linear_policy_loss(hidden, weight_VD, *others, weight_grad, *how)
    if rows is not None:
        logp = logp.new_zeros(len(target_N)).index_copy(0, rows, logp)
    return total, logp


def _check_tokens(count: int, values: dict[str, Tensor | None]) -> None:
    for name, value in values.items():
        if value is not None and (value.dtype != torch.float32 or value.shape != (count,)):
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}; pass torch.float32 ({count},), one for each row")
    if (values["old_logp"] is None) != (values["advantage"] is None):
        raise ValueError("one of old_logp and advantage is missing: pass both for PPO's loss, none for the negative log-likelihood")


@torch.library.custom_op("trivet::linear_policy_loss", mutates_args=())
def _linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor | None,
    weight_grad: Tensor | None,
    clip_low: float,
    clip_high: float,
    group: str,
    vocab_start: int,
    vocab_valid: int | None,
    inv_temp: float,
    chunk: int,
    logits_dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, logp, gradients of hidden and weight or empty ones). `weight_grad` waits for the backward pass."""
    shard = Shard.of(len(weight), group, vocab_start, vocab_valid)
    shard.check(target)
    stats = hidden.new_empty((5, len(target)), dtype=torch.float32)
    slopes = torch.zeros_like(stats)
    losses = torch.empty_like(token_weight)
    gradients = Gradients(hidden, weight, None, needs_hidden, needs_weight)
    buffer = logits_buffer(hidden, weight, chunk, logits_dtype)
    for part in chunks(len(target), chunk):
        logits = write_logits(buffer, hidden[part], weight)
        write_stats(stats[:, part], logits, target[part], shard, inv_temp, False)
        old, gain = (None if each is None else each[part] for each in (old_logp, advantage))
        losses[part], slopes[LOGP, part] = token_loss(stats[LOGP, part], token_weight[part], old, gain, clip_low, clip_high)
        if needs_hidden or needs_weight:
            grad_logits = gradients.room_for(logits, spoil=True)
            write_grads(grad_logits, logits, target[part], stats[:, part], slopes[:, part], shard, inv_temp, False)
            gradients.add(part, grad_logits)
    summed = gradients.new_weight_grad() if weight_grad is None else gradients.weight_grad
    return losses.sum(), stats[LOGP].clone(), gradients.hidden_grad, summed


def token_loss(
    logp: Tensor, weight: Tensor, old_logp: Tensor | None, advantage: Tensor | None, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Each token's term and its slope, d term / d logp."""
    if old_logp is None or advantage is None:
        return torch.where(weight != 0, -weight * logp, 0.0), -weight
    policy, slope, _ = clipped_policy(logp - old_logp, advantage, clip_low, clip_high)
    return torch.where(weight != 0, weight * policy, 0.0), torch.where(weight != 0, weight * slope, 0.0)


@_linear_policy_loss.register_fake
def _(hidden: Tensor, weight: Tensor, target: Tensor, token_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight_grad, needs_hidden, needs_weight = rest[2], *rest[-2:]
    return (
        token_weight.new_empty(()),
        torch.empty_like(token_weight),
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,), dtype=weight.dtype if weight_grad is None else torch.float32),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.weight_grad, *_, ctx.needs_hidden, ctx.needs_weight = inputs[6:]
    _, *rest = output
    ctx.save_for_backward(*rest[1:])
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_total: Tensor, *_: None) -> Any:
    grad_hidden, grad_weight = ctx.saved_tensors
    scaled_weight = None
    if ctx.needs_weight and ctx.weight_grad is not None:
        ctx.weight_grad.addcmul_(grad_weight, grad_total)
    elif ctx.needs_weight:
        scaled_weight = grad_weight * grad_total.to(grad_weight.dtype)
    return grad_hidden * grad_total.to(grad_hidden.dtype) if ctx.needs_hidden else None, scaled_weight, *[None] * 15


_linear_policy_loss.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.trivet.linear_policy_loss)
def _policy_flop(hidden: tuple[int, ...], weight: tuple[int, ...], *rest: Any, **_: Any) -> int:
    needs_hidden, needs_weight = rest[-2:]
    return 2 * hidden[0] * hidden[1] * weight[0] * (1 + needs_hidden + needs_weight)
