"""A Llama layer of megatron's parts, whose residual additions are made by the norms that follow them, in the same pass.

    normed, total = norm(x + residual)        x = attention(normed)        normed, total = norm(x + total)        x = mlp(normed)

A layer gives the next one x and total, not their sum. The last layer of a pipeline stage adds them for the next stage, and the model's
last for its final norm leaves that to it. With full recomputation each layer adds them: two tensors a layer would have to be kept.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from engine.megatron.attention import PackedForward
from triton_kernels import rmsnorm


class Addends:
    """Hidden states before their last addition, two of [T / tp, 1, D]. They are taken once: megatron's loop over layers keeps this object
    while the next layer runs, and must not keep them."""

    def __init__(self, x: Tensor, residual: Tensor):
        self._both = [x, residual]

    def take(self) -> list[Tensor]:
        """x and residual."""
        both, self._both = self._both, []
        return both


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (arXiv 1910.07467)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, device: torch.device, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # megatron sums the gradients of such weights over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor | Addends) -> Any:
        """(normed, hidden states), the latter added up where they were not."""
        if isinstance(hidden, Addends):
            x, residual = hidden.take()
            return rmsnorm(x, self.weight, self.eps, residual)
        return rmsnorm(hidden, self.weight, self.eps), hidden


class FinalNorm(RMSNorm):
    """The same behind all layers, where hidden states go no further."""

    def forward(self, hidden: Tensor | Addends) -> Tensor:
        """The normed ones alone."""
        return super().forward(hidden)[0]


class Layer(TransformerLayer):
    """`adds`: returns hidden states, which it is given as a tensor or as Addends; else Addends."""

    def __init__(self, *args: Any, adds: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.adds = adds

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor | Addends, attention_mask: Tensor | None = None, *, packed_seq_params: PackedForward, **_: Any
    ) -> tuple[Tensor | Addends, None]:
        """As megatron's, with nothing for cross-attention."""
        normed, total = self.input_layernorm(hidden_states)
        addends = Addends(self.self_attention(normed, packed_seq_params=packed_seq_params)[0], total)
        normed, total = self.pre_mlp_layernorm(addends)
        out, _bias = checkpoint(self.mlp, False, normed) if self.recompute_mlp else self.mlp(normed)
        return (out + total if self.adds else Addends(out, total)), None
