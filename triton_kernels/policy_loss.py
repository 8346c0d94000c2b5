"""A loss computed from hidden states, with its gradient computed in the forward pass: three products, and no logits are saved.

If a loss is a sum over tokens, the derivative of each term is known as soon as the token's log-prob is. A chunk's logits can then be
replaced by their gradient, and that yields the gradients of hidden and weight immediately; backward only scales them. For

    SFT    sum_t -w_t logp_t
    PPO    sum_t w_t (max(-r_t A_t, -clip(r_t, 1 - clip_low, 1 + clip_high) A_t) + kl_coef KL_t)    r_t = exp(logp_t - old_logp_t)

(Schulman et al., arXiv:1707.06347, eq. 7, with two clips; triton_kernels/ppo.py has the terms and the KL estimators). The weights w
include the mask and all normalization.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from triton_kernels.linear_logprob import Gradients, check_linear, chunk_rows, chunks, logits_buffer, write_logits
from triton_kernels.logprob import ENTROPY, LOGP, write_grads, write_stats
from triton_kernels.operator import operator
from triton_kernels.ppo import Kl, check_kl, policy_term
from triton_kernels.shard import Shard


def linear_policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    token_weight_N: Tensor,
    *,
    old_logp_N: Tensor | None = None,
    advantage_N: Tensor | None = None,
    ref_logp_N: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl: Kl = "k3",
    kl_coef: float = 0.0,
    rows: Tensor | None = None,
    group: str = "",
    vocab_start: int = 0,
    vocab_valid: int | None = None,
    inv_temp: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sum over tokens of a loss, differentiable in `hidden_ND` and `weight_VD`, and the log-probs.

    token_weight_N  [N], float32: w; tokens of weight 0 are ignored, whatever their other values
    advantage_N     [N], float32: PPO's clipped loss. None: negative log-likelihood
    old_logp_N      [N], float32, with advantage_N: log-probs of the policy that sampled. None: this policy did, and the ratio is 1
    ref_logp_N      [N], float32, with kl_coef: log-probs of the reference; see ppo_loss for `kl`
    rows            [M], int64: the rows to compute; the others cost nothing, and their log-prob is 0. None: all
    entropy         also compute the entropy of each row's distribution, in nats
    weight_grad     [V, D], float32: the weight's gradient is added to it in the forward pass, and autograd gets none for the weight. The
                    gradient of the total must then be 1: scale token_weight_N, not the total

    The other arguments are those of linear_logprob. Returns (total, float32 scalar; logp_N, entropy_N or None, float32, both without
    gradient). Log-ratios are clamped to ±20. Raises ValueError for wrong dtypes and shapes; in host memory, backward also raises it if a
    weight_grad is given and the gradient of the total is not 1.
    """
    chunk = chunk_rows(len(weight_VD)) if chunk is None else chunk
    check_linear(hidden_ND, weight_VD, target_N, inv_temp, chunk, logits_dtype, weight_grad)
    check_kl(kl, kl_coef, ref_logp_N, clip_low=clip_low, clip_high=clip_high)
    policy = {"old_logp": old_logp_N, "advantage": advantage_N, "ref_logp": ref_logp_N if kl_coef else None}
    _check_tokens(len(target_N), {"token_weight": token_weight_N, **policy})
    tokens = [hidden_ND, target_N, token_weight_N, *policy.values()]
    if rows is not None:
        tokens = [None if tensor is None else tensor.index_select(0, rows) for tensor in tokens]
    hidden, *others = tokens
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_ND, weight_VD)]
    settings = (clip_low, clip_high, kl, kl_coef, group, vocab_start, vocab_valid, inv_temp, entropy, chunk, logits_dtype, *needs)
    total, stats, _, _ = _linear_policy_loss(hidden, weight_VD, *others, weight_grad, *settings)
    if rows is not None:
        stats = stats.new_zeros((len(stats), len(target_N))).index_copy(1, rows, stats)
    return total, stats[0], stats[1] if entropy else None


def _check_tokens(count: int, values: dict[str, Tensor | None]) -> None:
    for name, value in values.items():
        if value is not None and (value.dtype != torch.float32 or value.shape != (count,)):
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}; pass torch.float32 ({count},), one for each row")
    for name in ("old_logp", "ref_logp"):
        if values[name] is not None and values["advantage"] is None:
            raise ValueError(f"{name} needs advantage: pass both for PPO's loss, or neither for the negative log-likelihood")


@operator("linear_policy_loss", mutates=("weight_grad",))
def _linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor | None,
    ref_logp: Tensor | None,
    weight_grad: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl: str,
    kl_coef: float,
    group: str,
    vocab_start: int,
    vocab_valid: int | None,
    inv_temp: float,
    entropy: bool,
    chunk: int,
    logits_dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total; log-probs, and with `entropy` entropies in the second row [1 or 2, N]; gradients of hidden and weight, each empty if it is
    not needed or was added to weight_grad)."""
    shard = Shard.of(len(weight), group, vocab_start, vocab_valid)
    shard.check(target)
    terms = Terms(token_weight, old_logp, advantage, ref_logp, clip_low, clip_high, kl, kl_coef)
    stats = hidden.new_empty((5, len(target)), dtype=torch.float32)
    slopes = torch.zeros_like(stats)
    totals = [token_weight.new_zeros(())]
    gradients = Gradients(hidden, weight, weight_grad, needs_hidden, needs_weight, chunk)
    buffer = logits_buffer(hidden, weight, chunk, logits_dtype)
    for part in chunks(len(target), chunk):
        logits = write_logits(buffer, hidden[part], weight, chunk)
        write_stats(stats[:, part], logits, target[part], shard, inv_temp, entropy)
        total, slopes[LOGP, part] = terms.part(part, stats[LOGP, part])
        totals.append(total)
        if needs_hidden or needs_weight:
            grad_logits = gradients.buffer_for(logits, reuse=True)
            write_grads(grad_logits, logits, target[part], stats[:, part], slopes[:, part], shard, inv_temp, False)
            gradients.add(part, grad_logits)
    returned = stats[: ENTROPY + 1 if entropy else LOGP + 1].clone()  # the first rows of stats
    return torch.stack(totals).sum(), returned, gradients.hidden_grad, gradients.new_weight_grad()


class Terms(NamedTuple):
    """A loss that is a sum over tokens: its inputs other than log-probs."""

    weight: Tensor
    old_logp: Tensor | None
    advantage: Tensor | None
    ref_logp: Tensor | None
    clip_low: float
    clip_high: float
    kl: str
    kl_coef: float

    def part(self, part: slice, logp: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of the terms of the tokens `part`, which have these log-probs; derivative of each term, d term / d logp)."""
        weight, old_logp, advantage, ref_logp = (None if tensor is None else tensor[part] for tensor in self[:4])
        assert weight is not None
        if advantage is None:
            slope = -weight
            return (slope * logp).masked_fill_(weight == 0, 0.0).sum(), slope
        old_logp = logp if old_logp is None else old_logp
        return policy_term(weight, logp, old_logp, advantage, ref_logp, self.clip_low, self.clip_high, self.kl, self.kl_coef)


@_linear_policy_loss.register_fake
def _(hidden: Tensor, weight: Tensor, target: Tensor, token_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight_grad, entropy, needs_hidden, needs_weight = rest[3], rest[12], *rest[-2:]
    return (
        token_weight.new_empty(()),
        token_weight.new_empty((1 + entropy, *token_weight.shape)),
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight and weight_grad is None else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, stats, *grads = output
    ctx.save_for_backward(*grads)
    ctx.accumulates = inputs[7] is not None
    ctx.mark_non_differentiable(stats, *grads)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_total: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grads = [grad if needed else None for grad, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)]
    if not ctx.accumulates:
        grads = [None if grad is None else grad * grad_total.to(grad.dtype) for grad in grads]
    elif grad_total.device.type == "cpu" and grad_total != 1:
        raise ValueError(f"the gradient of the total is {grad_total.item()}, but must be 1 with weight_grad; scale token_weight instead")
    return grads[0], None if ctx.accumulates else grads[1], *[None] * 19


_linear_policy_loss.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.trivet.linear_policy_loss)
def _policy_flop(hidden: tuple[int, ...], weight: tuple[int, ...], *rest: Any, **_: Any) -> int:
    needs_hidden, needs_weight = rest[-2:]
    return 2 * hidden[0] * hidden[1] * weight[0] * (1 + needs_hidden + needs_weight)
