"""The measured operations: inputs for each operation of benchmarks/kernels/floors.py, and this project's implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.kernels.floors import REACH, ROWS, Shape, reaches
from triton_kernels import (
    decode_attention,
    dpo_norm,
    draw,
    gae,
    linear_logprob,
    linear_policy_loss,
    logprob,
    ppo_loss,
    rmsnorm,
    rope,
    rope_qkv,
    swiglu,
)

EPS = 1e-5
BETA = 5.0
GAMMA, LAM = 0.99, 0.95
CLIP, KL_COEF = 0.2, 0.05
SEQUENCES = 16  # sequences per microbatch

Tensors = dict[str, Tensor]
Call = Callable[[], Any]
Contender = Callable[[Tensors], Call]  # an implementation: prepares the inputs and returns the call that is timed


@dataclass(frozen=True)
class Operation:
    """`draw` generates the inputs, `ours` are our implementations. Gradients are computed for the inputs named in `trained`.

    which   "forward" (without gradients), "backward" (of a forward pass that is not timed) or "both"
    """

    draw: Callable[[Shape, torch.device], Tensors]
    ours: Mapping[str, Contender]
    which: Literal["forward", "backward", "both"] = "forward"
    trained: tuple[str, ...] = ()


def timed(operation: Operation, contender: Contender, tensors: Tensors) -> Call:
    """The call of `contender` that is timed. It returns outputs, gradients, or (outputs, gradients), and has already run once."""
    leaves = [tensors[name].requires_grad_() for name in operation.trained]
    call = contender(tensors)
    if operation.which == "forward":
        forward = torch.no_grad()(call)
        forward()
        return forward
    outputs = _tuple(call())
    upstream = [torch.ones_like(output) if output.ndim < 2 else torch.randn_like(output) for output in outputs]
    if operation.which == "backward":
        return partial(torch.autograd.grad, outputs, leaves, upstream, retain_graph=True)
    return partial(_both, call, leaves, upstream)


def _both(call: Call, leaves: list[Tensor], upstream: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    outputs = _tuple(call())
    return outputs, torch.autograd.grad(outputs, leaves, upstream)


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def plain(function: Callable[[Tensors], Any]) -> Contender:
    """A contender without preparation."""
    return lambda tensors: partial(function, tensors)


def _normal(*size: int, device: torch.device, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(size, device=device) * scale).to(dtype)


def _norm_inputs(shape: Shape, device: torch.device) -> Tensors:
    size = shape.tokens // shape.tp, shape.hidden
    x, residual = _normal(*size, device=device), _normal(*size, device=device)
    return {"x": x, "residual": residual, "weight": _normal(shape.hidden, device=device)}


def _swiglu_inputs(shape: Shape, device: torch.device) -> Tensors:
    return {"gate_up": _normal(shape.tokens, 2 * shape.ffn // shape.tp, device=device)}


def _rope_inputs(shape: Shape, device: torch.device) -> Tensors:
    """Queries, keys and angles of packed sequences. Positions restart in each sequence."""
    position = torch.arange(shape.tokens, device=device) % max(1, shape.tokens // SEQUENCES)
    angles = position[:, None] * 5e5 ** -(torch.arange(0, shape.head_size, 2, device=device) / shape.head_size)
    q, k = (_normal(shape.tokens, heads // shape.tp, shape.head_size, device=device) for heads in (shape.heads, shape.kv_heads))
    return {"q": q, "k": k, "cos": angles.cos().bfloat16(), "sin": angles.sin().bfloat16()}


def _rope_qkv_inputs(shape: Shape, device: torch.device) -> Tensors:
    groups, shared = shape.kv_heads // shape.tp, shape.heads // shape.kv_heads + 2
    qkv = _normal(shape.tokens, groups, shared, shape.head_size, device=device)
    return {"qkv": qkv, **{name: x for name, x in _rope_inputs(shape, device).items() if name in ("cos", "sin")}}


def _logits_inputs(shape: Shape, device: torch.device) -> Tensors:
    vocab = shape.vocab // shape.tp
    logits = _normal(shape.tokens, vocab, device=device, scale=3.5)
    return {"logits": logits, "target": torch.randint(0, vocab, (shape.tokens,), device=device)}


def _draw_inputs(shape: Shape, device: torch.device) -> Tensors:
    keys = torch.randint(-(2**31), 2**31, (ROWS, 2), device=device).int()
    return {"logits": _normal(ROWS, shape.vocab // shape.tp, device=device, scale=3.5, dtype=torch.float32), "keys": keys}


def _decoding_inputs(shape: Shape, device: torch.device) -> Tensors:
    heads, kv_heads = shape.heads // shape.tp, shape.kv_heads // shape.tp
    keys, values = (_normal(ROWS, kv_heads, REACH, shape.head_size, device=device) for _ in range(2))
    query, lengths = _normal(ROWS, heads, shape.head_size, device=device), torch.tensor(reaches(), dtype=torch.int32, device=device)
    return {"query": query, "keys": keys, "values": values, "lengths": lengths}


def _linear_inputs(shape: Shape, device: torch.device) -> Tensors:
    vocab = shape.vocab // shape.tp
    hidden = _normal(shape.tokens, shape.hidden, device=device)
    weight = _normal(vocab, shape.hidden, device=device, scale=3.5 / shape.hidden**0.5)
    return {"hidden": hidden, "weight": weight, "target": torch.randint(0, vocab, (shape.tokens,), device=device)}


def _packed_inputs(shape: Shape, device: torch.device) -> Tensors:
    """float32 columns of all tokens, a quarter of them masked; sequences of equal length, in pairs of a chosen and a rejected one."""
    names = ("logp", "old_logp", "ref_logp", "advantage", "value", "reward")
    columns = {name: _normal(shape.tokens, device=device, dtype=torch.float32, scale=0.3) for name in names}
    mask = torch.rand(shape.tokens, device=device) > 0.25
    cu_seqlens = torch.arange(SEQUENCES + 1, device=device, dtype=torch.int32) * (shape.tokens // SEQUENCES)
    pairs = torch.arange(SEQUENCES, device=device, dtype=torch.int32).view(-1, 2)
    return columns | {"mask": mask, "weight": mask / shape.tokens, "cu_seqlens": cu_seqlens, "pairs": pairs}


def _rmsnorm(t: Tensors) -> Any:
    return rmsnorm(t["x"], t["weight"], EPS, t["residual"])


def _rope(t: Tensors) -> Any:
    return rope(t["q"], t["cos"], t["sin"]), rope(t["k"], t["cos"], t["sin"])


def _rope_qkv(t: Tensors) -> Any:
    return rope_qkv(t["qkv"], t["cos"], t["sin"])


def _logprob(t: Tensors) -> Tensor:
    return logprob(t["logits"], t["target"])[0]


def _draw(t: Tensors) -> Tensor:
    return draw(t["logits"], t["keys"])


def _decode_attention(t: Tensors) -> Tensor:
    return decode_attention(t["query"], t["keys"], t["values"], t["lengths"])


def _linear(**options: Any) -> Contender:
    return plain(lambda t: linear_logprob(t["hidden"], t["weight"], t["target"], **options)[0])


def _policy_loss(t: Tensors) -> Tensor:
    ones = torch.ones(len(t["target"]), device=t["target"].device)
    return linear_policy_loss(t["hidden"], t["weight"], t["target"], ones)[0]


def _dpo(t: Tensors) -> Tensor:
    return dpo_norm(t["logp"], t["ref_logp"], t["mask"], t["cu_seqlens"], t["pairs"], BETA)[0]


def _ppo(t: Tensors) -> Tensor:
    options: dict[str, Any] = {"clip_low": CLIP, "clip_high": CLIP, "kl_coef": KL_COEF, "ref_logp": t["ref_logp"]}
    return ppo_loss(t["logp"], t["old_logp"], t["advantage"], t["weight"], **options)[0]


def _gae(t: Tensors) -> Any:
    return gae(t["reward"], t["value"], t["mask"], t["cu_seqlens"], GAMMA, LAM)


OURS = "ours"
_NORM, _SWIGLU, _LOGPROB = ({OURS: plain(f)} for f in (_rmsnorm, lambda t: swiglu(t["gate_up"]), _logprob))
_BF16 = {"logits_dtype": torch.bfloat16}
_OUTPUT_LAYER = ("hidden", "weight")

OPERATIONS: dict[str, Operation] = {  # by the names of floors.OPERATIONS
    "linear_logprob forward": Operation(
        _linear_inputs, {OURS: _linear(mode="nograd"), "ours, bfloat16 logits": _linear(mode="nograd", **_BF16)}
    ),
    "linear_logprob forward and backward": Operation(
        _linear_inputs,
        {OURS: _linear(), "ours, bfloat16 logits": _linear(**_BF16), "ours, gradient in forward (linear_policy_loss)": plain(_policy_loss)},
        "both",
        _OUTPUT_LAYER,
    ),
    "linear_logprob forward and backward, recomputed": Operation(_linear_inputs, {OURS: _linear(mode="recompute")}, "both", _OUTPUT_LAYER),
    "logprob forward": Operation(_logits_inputs, _LOGPROB),
    "logprob backward": Operation(_logits_inputs, _LOGPROB, "backward", ("logits",)),
    "logprob forward and backward": Operation(_logits_inputs, _LOGPROB, "both", ("logits",)),
    "draw": Operation(_draw_inputs, {OURS: plain(_draw)}),
    "decode_attention": Operation(_decoding_inputs, {OURS: plain(_decode_attention)}),
    "rmsnorm forward fused": Operation(_norm_inputs, _NORM),
    "rmsnorm backward fused": Operation(_norm_inputs, _NORM, "backward", ("x", "residual", "weight")),
    "swiglu forward": Operation(_swiglu_inputs, _SWIGLU),
    "swiglu backward": Operation(_swiglu_inputs, _SWIGLU, "backward", ("gate_up",)),
    "rope": Operation(_rope_inputs, {OURS: plain(_rope)}),
    "rope_qkv forward": Operation(_rope_qkv_inputs, {OURS: plain(_rope_qkv)}),
    "rope_qkv backward": Operation(_rope_qkv_inputs, {OURS: plain(_rope_qkv)}, "backward", ("qkv",)),
    "dpo_norm": Operation(_packed_inputs, {OURS: plain(_dpo)}, "both", ("logp",)),
    "ppo_loss": Operation(_packed_inputs, {OURS: plain(_ppo)}, "both", ("logp",)),
    "gae": Operation(_packed_inputs, {OURS: plain(_gae)}),
}
