"""log p(target) straight from hidden states: the output layer and the softmax in one, a chunk of rows at a time, in fp32.

logits = hidden @ weight.T        logprob = logits[target] - logsumexp(logits)

Logits of a whole microbatch never exist: a chunk's are turned into exp(logits - max) in place, which is all that the backward
pass needs. Rows whose log-probs nobody asked for are dropped before the product. With a vocabulary cut over a process group, one
gather of (max, sum, target logit) a row makes the result whole, merged in rank order so that every rank has the same bits.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

Mode = Literal["save", "recompute"]


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    rows_M: Tensor | None = None,
    group: str = "",
    vocab_start: int = 0,
    vocab_valid: int | None = None,
    mode: Mode = "save",
    chunk: int = 4096,
) -> Tensor:
    """Natural-log probability of each row's target, differentiable in `hidden_ND` and `weight_VD`.

    hidden_ND   [N, D], float; the same on every rank of the group
    weight_VD   [V, D], this rank's rows of the output layer, the vocabulary's ids vocab_start ... vocab_start + V
    target_N    [N], int64 ids of the whole vocabulary
    rows_M      [M], int64: the rows that are wanted; the others are 0 and cost nothing. None: all
    group       name of the process group the vocabulary is cut over; "": it is whole
    vocab_valid ids from here on are padding and have probability 0. None: no padding
    mode        "save" keeps exp(logits) of the wanted rows for backward (three products in all), "recompute" makes them again (four)
    chunk       rows at a time

    Returns logprob_N [N], float32. The gradient of `hidden_ND` is this rank's part; its sum over the group is the whole one.
    """
    rows_M = torch.arange(len(target_N), device=target_N.device) if rows_M is None else rows_M
    logprob_M = _LinearLogprob.apply(
        hidden_ND.index_select(0, rows_M), weight_VD, target_N.index_select(0, rows_M), group, vocab_start, vocab_valid, mode, chunk
    )
    return torch.zeros(len(target_N), dtype=torch.float32, device=hidden_ND.device).index_copy(0, rows_M, logprob_M)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, group: str, start: int, valid: int | None, mode: Mode, chunk: int
    ) -> Tensor:
        logprob = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
        scale = torch.empty_like(logprob)
        keep = mode == "save" and any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        for part in _parts(len(target), chunk):
            logits = _logits(hidden[part], weight, start, valid)
            chosen, column = _local(target[part], start, len(weight))
            logit = torch.where(chosen, logits.gather(1, column[:, None])[:, 0], 0.0)
            top = _exp_in_place(logits)
            lse, whole_logit = _merge(top, logits.sum(1), logit, group)
            logprob[part] = whole_logit - lse
            scale[part] = torch.exp(top - lse)
            if keep:
                kept.append(logits)
        ctx.save_for_backward(hidden, weight, target, scale, *kept)
        ctx.cut = (start, valid, chunk)
        return logprob

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, target, scale, *kept = ctx.saved_tensors
        start, valid, chunk = ctx.cut
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for i, part in enumerate(_parts(len(target), chunk)):
            if kept:
                exps = kept[i]
            else:
                exps = _logits(hidden[part], weight, start, valid)
                _exp_in_place(exps)
            grad_logits = _grad_logits(exps, scale[part], grads[0][part], target[part], start).to(weight.dtype)
            grad_hidden[part] = grad_logits @ weight
            grad_weight += _product(grad_logits.T, hidden[part])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None, None


def _parts(count: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, count)) for i in range(0, count, chunk)]


def _logits(hidden: Tensor, weight: Tensor, start: int, valid: int | None) -> Tensor:
    """hidden @ weight.T in fp32 [n, V]; columns of padding ids are -inf."""
    logits = _product(hidden, weight.T)
    if valid is not None and start + len(weight) > valid:
        logits[:, max(0, valid - start) :] = -torch.inf
    return logits


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cpu":  # no mixed-precision product there
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _exp_in_place(logits: Tensor) -> Tensor:
    """logits -> exp(logits - row maximum), in place; returns the maxima [n]. A row that is all padding becomes zeros."""
    top = logits.amax(1).clamp_min(torch.finfo(torch.float32).min)
    logits.sub_(top[:, None]).exp_()
    return top


def _local(target: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Which targets are among this rank's columns, and the column of each (0 for the others)."""
    inside = (target >= start) & (target < start + size)
    return inside, torch.where(inside, target - start, 0)


def _merge(top: Tensor, total: Tensor, logit: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Each rank's (maximum, sum of exp, target logit) [n] -> (logsumexp, target logit) of the whole vocabulary, equal on all ranks."""
    if not group:
        return top + total.log(), logit
    process_group = _resolve_process_group(group)  # type: ignore[arg-type]
    mine = torch.stack([top, total, logit])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(parts, mine, group=process_group)
    tops, totals, logits = torch.stack(parts, 1)
    whole_top = tops.amax(0)
    return whole_top + (totals * torch.exp(tops - whole_top)).sum(0).log(), logits.sum(0)


def _grad_logits(exps: Tensor, scale: Tensor, grad: Tensor, target: Tensor, start: int) -> Tensor:
    """d loss / d logits = grad * (onehot(target) - softmax), written over `exps`."""
    inside, column = _local(target, start, exps.shape[1])
    exps.mul_((-grad * scale)[:, None])
    return exps.scatter_add_(1, column[:, None], torch.where(inside, grad, 0.0)[:, None])
