"""Causal attention over packed sequences, between megatron's projections, and what travels to it."""

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
    """One microbatch on its way through the model. It rides in megatron's own `packed_seq_params` argument, from embedding to log-probs."""

    lengths: tuple[int, ...] = ()  # tokens of each sequence, on the host
    cos_TK: Tensor = None  # type: ignore[assignment]  # float32 [T, K/2], made once for all layers
    sin_TK: Tensor = None  # type: ignore[assignment]
    rows_M: Tensor = None  # type: ignore[assignment]  # tokens whose log-probs are wanted
    inv_temp: float = 1.0  # 1 / the temperature that log-probs are taken at
    entropy: bool = False  # beside the log-probs: [2, T]
    terms: TokenTerms | None = None  # the loss, where the output layer makes its gradient
    kv_write: Any = None  # generation only: the caches it writes and how it draws (decode.py)

    @staticmethod
    def of(
        packed: Packed, rows_M: Tensor, model: ModelShape, device: torch.device, inv_temp: float = 1.0, entropy: bool = False
    ) -> PackedForward:
        """`packed` is on the host; what the model needs of it goes to `device`."""
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
    """cos and sin of each position's angles, float32 [T, K/2]."""
    angles = positions_T.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rope_frequencies(model: ModelShape) -> Tensor:
    """Radians per position of each pair of a head's dimensions, float32 [K/2] (RoFormer, arXiv 2104.09864; Llama 3.1's scaling)."""
    frequency = model.rope_theta ** -(torch.arange(0, model.head_dim, 2).double() / model.head_dim)
    if (scaling := model.rope_scaling) is not None:
        turns = scaling.original_length * frequency / (2 * math.pi)  # over the original context
        keep = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    return frequency.float()


class PackedSelfAttention(SelfAttention):
    """megatron's two projections with PackedAttention between them, which takes the first one's product as it is."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: PackedForward, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [T / tp, 1, D] -> the same, and no bias."""
        qkv, _bias = self.linear_qkv(hidden_states)  # type: ignore[operator]
        out = self.core_attention(qkv, packed_seq_params=packed_seq_params)  # type: ignore[operator]
        return self.linear_proj(out)


class PackedAttention(torch.nn.Module):
    """Replaces megatron's core_attention: rotary embedding, then causal attention within each sequence."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, attend: Attend, **_: Any):
        super().__init__()
        self.layer, self.attend = layer_number, attend
        self.shared, self.size = config.num_attention_heads // config.num_query_groups + 2, config.kv_channels

    def forward(self, qkv: Tensor, *, packed_seq_params: PackedForward) -> Tensor:
        """qkv [T, 1, KV * (G + 2) * K], as triton_kernels.rope_qkv takes it -> [T, 1, H * K]."""
        packed_forward = packed_seq_params
        query, key, value = rope_qkv(qkv.view(len(qkv), -1, self.shared, self.size), packed_forward.cos_TK, packed_forward.sin_TK)
        if packed_forward.kv_write is not None:
            return packed_forward.kv_write.attend(self.layer, query, key, value, packed_forward, self.attend).flatten(1)[:, None]
        return self.attend(query, key, value, packed_forward).flatten(1)[:, None]


def attend_for(on_gpu: bool) -> Attend:
    """On GPUs flash-attn's varlen kernel where installed, else torch's own; elsewhere torch's CPU kernel sequence by sequence."""
    if not on_gpu:
        return attend_by_sequence
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return _varlen()

    def attend_flash(query: Tensor, key: Tensor, value: Tensor, packed_forward: PackedForward) -> Tensor:
        cu, longest = packed_forward.cu_seqlens_q, packed_forward.max_seqlen_q
        repeatable = torch.are_deterministic_algorithms_enabled()
        return flash_attn_varlen_func(query, key, value, cu, cu, longest, longest, causal=True, deterministic=repeatable)

    return attend_flash


def _varlen() -> Attend:
    """torch's flash attention over cu_seqlens (bf16 or fp16), as this torch spells it: its arguments changed after 2.11."""
    from torch.nn.attention import varlen

    accepts = inspect.signature(varlen.varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in accepts else {"is_causal": True}
    # Without the argument, its flash attention takes fewer heads of keys than of queries unasked.
    options = causal | ({"enable_gqa": True} if "enable_gqa" in accepts else {})

    def attend(query: Tensor, key: Tensor, value: Tensor, packed_forward: PackedForward) -> Tensor:
        cu, longest = packed_forward.cu_seqlens_q, packed_forward.max_seqlen_q
        return varlen.varlen_attn(query, key, value, cu, cu, longest, longest, **options)  # type: ignore[return-value]

    return attend


def attend_by_sequence(query: Tensor, key: Tensor, value: Tensor, packed_forward: PackedForward) -> Tensor:
    """The same where no GPU is: by torch's CPU kernel one sequence at a time, and on meta tensors as shapes alone."""
    return _attention(query, key, value, list(packed_forward.lengths))[0]


@torch.library.custom_op("trivet::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """(out [T, H, K], logsumexp [H, T]), kept for backward beside query, key and value: what flash attention's kernels keep, so that a
    rehearsal on meta tensors holds what a GPU will."""
    assert sum(lengths) == len(query), f"sequences of {lengths} tokens are not {len(query)}"
    out, lse_HT = _flash_outputs(query)
    for part in _spans(lengths):
        of_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(part, query, key, value), 0.0, True)
        out[part], lse_HT[:, part] = of_part[0][0].transpose(0, 1), of_part[1][0]
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
        given = _heads_first(part, grad, query, key, value, out)
        of_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, lse_HT[None, :, part], 0.0, True)
        for whole, piece in zip(grads, of_part, strict=True):
            whole[part] = piece[0].transpose(0, 1)
    return grads


@_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.lengths = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attention_grads(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.lengths), None


_attention.register_autograd(_attention_grads, setup_context=_keep)


def _flash_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


def _spans(lengths: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(accumulate(lengths, initial=0)) if end > start]


def _heads_first(part: slice, *tensors: Tensor) -> list[Tensor]:
    """[T, H, K] -> [1, H, L, K] of one sequence."""
    return [x[part].transpose(0, 1)[None] for x in tensors]
