"""Other implementations ("peers") of the same operations: for each, a function from the tensors to the call that is timed.

A package is imported when it is measured; if it is not installed, the ImportError becomes a line of the page. Loss functions return the
negative log-prob per row, or the sum over rows if they only compute that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.operations import (
    BETA,
    CLIP,
    EPS,
    GAMMA,
    KL_COEF,
    LAM,
    SEQUENCES,
    Call,
    Contender,
    Tensors,
    plain,
)  # fmt: skip

Outputs = Tensor | tuple[Tensor, ...]


def compiled(function: Callable[[Tensors], Outputs]) -> Contender:
    """`function` compiled with torch.compile for static shapes."""

    def prepared(tensors: Tensors) -> Call:
        torch.compiler.reset()
        functorch.donated_buffer = False  # the backward pass runs many times
        return partial(torch.compile(function, dynamic=False), tensors)

    return prepared


def eager_rmsnorm(t: Tensors) -> Outputs:
    total = t["x"] + t["residual"]
    return F.rms_norm(total, total.shape[-1:], t["weight"], EPS), total


def eager_swiglu(t: Tensors) -> Outputs:
    gate, up = t["gate_up"].chunk(2, -1)
    return F.silu(gate) * up


def eager_rope(t: Tensors) -> Outputs:
    """As in transformers' Llama."""
    cos, sin = (torch.cat([t[name], t[name]], -1)[:, None] for name in ("cos", "sin"))
    return tuple(x * cos + _rotate_half(x) * sin for x in (t["q"], t["k"]))


def eager_rope_qkv(t: Tensors) -> Outputs:
    """Split, then rotated as above. Values are copied, because a view would keep the whole product alive until backward."""
    queries = t["qkv"].shape[2] - 2
    query, key, value = t["qkv"].split([queries, 1, 1], 2)
    rotated = eager_rope({"q": query.flatten(1, 2), "k": key.flatten(1, 2), "cos": t["cos"], "sin": t["sin"]})
    return *rotated, value.flatten(1, 2).contiguous()


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def eager_logprob(t: Tensors) -> Outputs:
    return F.cross_entropy(t["logits"].float(), t["target"], reduction="none")


def eager_draw(t: Tensors) -> Outputs:
    return torch.multinomial(t["logits"].softmax(-1), 1)[:, 0]


def eager_decode_attention(t: Tensors) -> Outputs:
    """Masked attention over the longest row's positions. The query heads of a key head become query positions."""
    keys, values, (rows, _, size) = t["keys"], t["values"], t["query"].shape
    visible = torch.arange(keys.shape[2], device=keys.device) < t["lengths"][:, None]
    grouped = t["query"].view(rows, keys.shape[1], -1, size)
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible[:, None, None]).view_as(t["query"])


def eager_linear(t: Tensors) -> Outputs:
    """As in transformers: logits in the weights' dtype, converted to float32."""
    return F.cross_entropy(F.linear(t["hidden"], t["weight"]).float(), t["target"], reduction="none")


def eager_dpo(t: Tensors) -> Outputs:
    sequence = torch.searchsorted(t["cu_seqlens"][1:], torch.arange(len(t["mask"]), device=t["mask"].device, dtype=torch.int32), right=True)
    mask, zero = t["mask"].float(), t["logp"].new_zeros(SEQUENCES)
    counts = zero.index_add(0, sequence, mask).clamp(min=1)
    reward = BETA * zero.index_add(0, sequence, (t["logp"] - t["ref_logp"]) * mask) / counts
    chosen, rejected = reward[t["pairs"].long()].unbind(1)
    return -F.logsigmoid(chosen - rejected)


def eager_ppo(t: Tensors) -> Outputs:
    advantage, ratio = t["advantage"], (t["logp"] - t["old_logp"]).exp()
    policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP))
    log_ratio = t["ref_logp"] - t["logp"]
    kl = log_ratio.exp() - 1 - log_ratio
    return (t["weight"] * (policy + KL_COEF * kl)).sum()


def eager_gae(t: Tensors) -> Outputs:
    """As in other trainers: one position of all (padded) sequences at a time, from the right; masked tokens are skipped."""
    reward, value, mask = (t[name].view(SEQUENCES, -1).float().unbind(1) for name in ("reward", "value", "mask"))
    next_value, advantage, advantages = torch.zeros_like(reward[0]), torch.zeros_like(reward[0]), []
    for r, v, active in zip(reversed(reward), reversed(value), reversed(mask), strict=True):
        estimate = r + GAMMA * next_value - v + GAMMA * LAM * advantage
        advantage, next_value = torch.lerp(advantage, estimate, active), torch.lerp(next_value, v, active)
        advantages.append(advantage * active)
    flat = torch.stack(advantages[::-1], 1).flatten()
    return flat, flat + t["value"] * t["mask"]


def builtin_linear(reduction: str, chunked: bool) -> Contender:
    """torch.nn.functional.linear_cross_entropy, if this torch version has it."""

    def prepared(t: Tensors) -> Call:
        if not hasattr(F, "linear_cross_entropy"):
            raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
        loss: Any = F.linear_cross_entropy
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return lambda: loss(t["hidden"], t["weight"], t["target"], reduction=reduction, options=options)

    return prepared


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def liger_rmsnorm(t: Tensors) -> Call:
    liger_fused_add_rms_norm = _attribute("liger_kernel.transformers.functional", "liger_fused_add_rms_norm")
    return lambda: liger_fused_add_rms_norm(t["x"], t["residual"], t["weight"], EPS, in_place=False)


def liger_swiglu(t: Tensors) -> Call:
    function = _attribute("liger_kernel.ops.swiglu", "LigerFusedGateUpSiLUMulFunction")
    return lambda: function.apply(t["gate_up"])


def liger_rope(t: Tensors) -> Call:
    """Takes [1, heads, tokens, size] and rotates in place."""
    rotate = _attribute("liger_kernel.transformers.functional", "liger_rope")
    q, k = (t[name].transpose(0, 1)[None] for name in ("q", "k"))
    cos, sin = (torch.cat([t[name], t[name]], -1)[None] for name in ("cos", "sin"))
    return lambda: rotate(q, k, cos, sin)


def liger_logprob(t: Tensors) -> Call:
    """Overwrites the logits with their gradient."""
    liger_cross_entropy = _attribute("liger_kernel.transformers.functional", "liger_cross_entropy")
    return lambda: liger_cross_entropy(t["logits"], t["target"], reduction="none")


def liger_linear(reduction: str, accum_dtype: torch.dtype | None = None) -> Contender:
    def prepared(t: Tensors) -> Call:
        liger_fused_linear_cross_entropy = _attribute("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
        options = {"reduction": reduction, "accum_dtype": accum_dtype}
        return lambda: liger_fused_linear_cross_entropy(t["hidden"], t["weight"], t["target"], **options)

    return prepared


def cce_linear(reduction: str) -> Contender:
    def prepared(t: Tensors) -> Call:
        linear_cross_entropy = _attribute("cut_cross_entropy", "linear_cross_entropy")
        return lambda: linear_cross_entropy(t["hidden"], t["weight"], t["target"], reduction=reduction)

    return prepared


def flash_attn_logprob(t: Tensors) -> Call:
    cross_entropy_loss = _attribute("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    return lambda: cross_entropy_loss(t["logits"], t["target"])[0]


def flash_attn_decode_attention(t: Tensors) -> Call:
    """Takes keys and values as [rows, positions, heads, size]."""
    attend = _attribute("flash_attn", "flash_attn_with_kvcache")
    keys, values = (t[name].transpose(1, 2).contiguous() for name in ("keys", "values"))
    return lambda: attend(t["query"][:, None], keys, values, cache_seqlens=t["lengths"])


def quack_rmsnorm(t: Tensors) -> Call:
    rmsnorm = _attribute("quack.rmsnorm", "rmsnorm")
    return lambda: rmsnorm(t["x"], t["weight"], residual=t["residual"], eps=EPS, prenorm=True)


def quack_logprob(t: Tensors) -> Call:
    cross_entropy = _attribute("quack.cross_entropy", "cross_entropy")
    return lambda: cross_entropy(t["logits"], t["target"], reduction="none")


def quack_linear(t: Tensors) -> Call:
    chunked_linear_cross_entropy = _attribute("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda: chunked_linear_cross_entropy(t["hidden"], t["weight"], t["target"], reduction="sum")


COMPILED = "torch.compile"
EAGER = "torch eager"


def _torch(function: Callable[[Tensors], Outputs]) -> dict[str, Contender]:
    return {EAGER: plain(function), COMPILED: compiled(function)}


def _linear(reduction: str) -> dict[str, Contender]:
    return {
        "F.linear_cross_entropy": builtin_linear(reduction, chunked=False),
        "F.linear_cross_entropy, chunked": builtin_linear(reduction, chunked=True),
        "Liger": liger_linear(reduction),
        "Liger, float32 sums": liger_linear(reduction, torch.float32),
        "cut-cross-entropy": cce_linear(reduction),
        "quack": quack_linear,
        **_torch(eager_linear),
    }


_NORM: dict[str, Contender] = {"Liger": liger_rmsnorm, "quack": quack_rmsnorm, **_torch(eager_rmsnorm)}
_SWIGLU: dict[str, Contender] = {"Liger": liger_swiglu, **_torch(eager_swiglu)}
_LOGPROB: dict[str, Contender] = {"flash-attn": flash_attn_logprob, "quack": quack_logprob, **_torch(eager_logprob)}

PEERS: dict[str, dict[str, Contender]] = {  # by operation; operations without an entry have no peer
    "linear_logprob forward": _linear("none"),
    "linear_logprob forward and backward": _linear("sum"),
    "logprob forward": _LOGPROB | {"Liger": liger_logprob},
    "logprob backward": _LOGPROB,  # Liger computes the gradient in its forward pass
    "logprob forward and backward": _LOGPROB | {"Liger": liger_logprob},
    "draw": _torch(eager_draw),
    "decode_attention": {"flash-attn": flash_attn_decode_attention, **_torch(eager_decode_attention)},
    "rmsnorm forward fused": _NORM,
    "rmsnorm backward fused": _NORM,
    "swiglu forward": _SWIGLU,
    "swiglu backward": _SWIGLU,
    "rope": _torch(eager_rope) | {"Liger": liger_rope},
    "rope_qkv forward": _torch(eager_rope_qkv),
    "rope_qkv backward": _torch(eager_rope_qkv),
    "dpo_norm": _torch(eager_dpo),
    "ppo_loss": _torch(eager_ppo),
    "gae": {EAGER: plain(eager_gae)},  # compiled, a loop over hundreds of steps would be unrolled
}


def why(error: BaseException) -> str:
    """The reason why a peer was not measured, in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"not installed ({error.name})"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
