"""Causal attention over packed sequences, between megatron's projections, and the arguments that a microbatch passes to it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from engine.config import ModelShape
from engine.types import Packed, TokenTerms
from triton_kernels import rope_qkv

Attend = Callable[[Tensor, Tensor, Tensor, "PackedForward"], Tensor]  # q [T, H, K], k and v [T, KV, K] -> [T, H, K]


@dataclass
class PackedForward(PackedSeqParams):
    """The inputs of one forward pass over packed sequences. The model receives it as megatron's `packed_seq_params` argument."""

    lengths: tuple[int, ...] = ()  # tokens of each sequence, on the host
    cos_TK: Tensor = None  # type: ignore[assignment]  # float32 [T, K/2], computed once for all layers
    sin_TK: Tensor = None  # type: ignore[assignment]
    rows_M: Tensor = None  # type: ignore[assignment]  # tokens to compute log-probs of
    inv_temp: float = 1.0  # 1 / temperature of the log-probs
    entropy: bool = False  # also return entropies: [2, T]
    terms: TokenTerms | None = None  # the loss, if the output layer computes its gradient
    kv_write: Any = None  # generation only: KV cache and sampling (decode.KVWrite)

    @staticmethod
    def of(
        packed: Packed, rows_M: Tensor, model: ModelShape, device: torch.device, inv_temp: float = 1.0, entropy: bool = False
    ) -> PackedForward:
        """From `packed` on the host; tensors are moved to `device`."""
        lengths = packed.cu_seqlens.diff().tolist()
        cos, sin = rope_angles(packed.positions_T, rope_frequencies(model))
        cu_seqlens = packed.cu_seqlens.to(device)
        longest = max(lengths)
        return PackedForward(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=tuple(lengths),
            cos_TK=cos.to(device),
            sin_TK=sin.to(device),
            rows_M=rows_M.to(device),
            inv_temp=inv_temp,
            entropy=entropy,
        )


def rope_angles(positions_T: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles at each position, float32 [T, K/2]."""
    angles = positions_T.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rope_frequencies(model: ModelShape) -> Tensor:
    """Radians per position of each pair of a head's dimensions, float32 [K/2] (RoFormer, arXiv 2104.09864; Llama 3.1's scaling)."""
    frequency = model.rope_theta ** -(torch.arange(0, model.head_dim, 2).double() / model.head_dim)
    if (scaling := model.rope_scaling) is not None:
        turns = scaling.original_length * frequency / (2 * math.pi)  # rotations over the original context
        keep = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    return frequency.float()


class PackedSelfAttention(SelfAttention):
    """megatron's two projections with PackedAttention between them, which takes the fused QKV output directly."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: PackedForward, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [T / tp, 1, D] -> (output of the same shape, None for the bias)."""
        qkv, _bias = self.linear_qkv(hidden_states)  # type: ignore[operator]
        out = self.core_attention(qkv, packed_seq_params=packed_seq_params)  # type: ignore[operator]
        return self.linear_proj(out)


class PackedAttention(torch.nn.Module):
    """Replaces megatron's core_attention: rotary embedding, then causal attention within each sequence."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, attend: Attend, **_: Any):
        super().__init__()
        self.layer, self.attend = layer_number, attend
        self.heads_per_group, self.size = config.num_attention_heads // config.num_query_groups + 2, config.kv_channels

    def forward(self, qkv: Tensor, *, packed_seq_params: PackedForward) -> Tensor:
        """qkv [T, 1, KV * (G + 2) * K], in the layout of triton_kernels.rope_qkv; G = H / KV -> [T, 1, H * K]."""
        packed_forward = packed_seq_params
        query, key, value = rope_qkv(qkv.view(len(qkv), -1, self.heads_per_group, self.size), packed_forward.cos_TK, packed_forward.sin_TK)
        if packed_forward.kv_write is not None:
            return packed_forward.kv_write.attend(self.layer, query, key, value, packed_forward, self.attend).flatten(1)[:, None]
        return self.attend(query, key, value, packed_forward).flatten(1)[:, None]


def backend_name(on_gpu: bool) -> str:
    """The implementation that `attend_for` returns."""
    if not on_gpu:
        return "torch, one sequence at a time"
    return "flash-attn" if _flash_attn_varlen() else "torch varlen"


def attend_for(on_gpu: bool) -> Attend:
    """On GPUs flash-attn's varlen kernel if installed, else torch's; otherwise torch's CPU kernel, one sequence at a time."""
    if not on_gpu:
        return attend_by_sequence
    flash_attn_varlen = _flash_attn_varlen()
    if flash_attn_varlen is None:
        return _varlen()

    def attend_flash(query: Tensor, key: Tensor, value: Tensor, packed_forward: PackedForward) -> Tensor:
        cu, longest = packed_forward.cu_seqlens_q, packed_forward.max_seqlen_q
        deterministic = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen(query, key, value, cu, cu, longest, longest, causal=True, deterministic=deterministic)

    return attend_flash


def _flash_attn_varlen() -> Callable[..., Tensor] | None:
    """flash-attn's kernel; None if it is not installed, or was built for another torch and cannot be imported."""
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return None
    return flash_attn_varlen_func


def _varlen() -> Attend:
    """torch's varlen flash attention (bf16 or fp16). Its arguments changed after torch 2.11, so they are looked up."""
    from torch.nn.attention import varlen

    accepts = inspect.signature(varlen.varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in accepts else {"is_causal": True}
    # Versions without the argument accept fewer KV heads than query heads by default.
    options = causal | ({"enable_gqa": True} if "enable_gqa" in accepts else {})

    def attend(query: Tensor, key: Tensor, value: Tensor, packed_forward: PackedForward) -> Tensor:
        cu, longest = packed_forward.cu_seqlens_q, packed_forward.max_seqlen_q
        return varlen.varlen_attn(query, key, value, cu, cu, longest, longest, **options)  # type: ignore[return-value]

    return attend


def attend_by_sequence(query: Tensor, key: Tensor, value: Tensor, packed_forward: PackedForward) -> Tensor:
    """Attention without a GPU: torch's CPU kernel, one sequence at a time; on meta tensors only shapes."""
    return _attention(query, key, value, list(packed_forward.lengths))[0]


@torch.library.custom_op("trivet::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(out [T, H, K], logsumexp [H, T]), both saved for backward with query, key and value.

    Flash attention on GPUs saves the same tensors, so memory measured on meta tensors is that of a GPU.
    """
    assert sum(lengths) == len(query), f"lengths={lengths} do not add up to {len(query)} tokens"
    out, lse_HT = _flash_outputs(query)
    for part in _spans(lengths):
        attended = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(part, query, key, value), 0.0, True)
        out[part], lse_HT[:, part] = attended[0][0].transpose(0, 1), attended[1][0]
    return out, lse_HT


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    return _flash_outputs(query)


@torch.library.custom_op("trivet::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse_HT: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    for part in _spans(lengths):
        inputs = _heads_first(part, grad, query, key, value, out)
        part_grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, lse_HT[None, :, part], 0.0, True)
        for full_grad, part_grad in zip(grads, part_grads, strict=True):
            full_grad[part] = part_grad[0].transpose(0, 1)
    return grads


@_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.lengths = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attention_grads(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.lengths), None


_attention.register_autograd(_attention_grads, setup_context=_save)


def _flash_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


def _spans(lengths: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(accumulate(lengths, initial=0)) if end > start]


def _heads_first(part: slice, *tensors: Tensor) -> list[Tensor]:
    """[T, H, K] -> [1, H, L, K] of one sequence."""
    return [x[part].transpose(0, 1)[None] for x in tensors]
