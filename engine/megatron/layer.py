"""A Llama layer built from megatron's modules, with each residual addition fused into the RMSNorm that follows it.

    normed, total = norm(x + residual)        x = attention(normed)        normed, total = norm(x + total)        x = mlp(normed)

A layer passes x and total to the next layer, not their sum. The last layer of a pipeline stage adds them before they are sent; the last
layer of the model leaves the addition to the final norm. With full recomputation every layer adds them, so that one tensor per layer is
saved instead of two.
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
    """Hidden states as two addends, each [T / tp, 1, D].

    They can be taken only once: megatron's loop over layers holds this object while the next layer runs, and must not keep them alive.
    """

    def __init__(self, x: Tensor, residual: Tensor):
        self._both = [x, residual]

    def take(self) -> list[Tensor]:
        """Returns [x, residual] and releases both."""
        both, self._both = self._both, []
        return both


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, device: torch.device, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # megatron sums the gradients of such weights over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor | Addends) -> Any:
        """Returns (normed, hidden states); Addends are added first."""
        if isinstance(hidden, Addends):
            x, residual = hidden.take()
            return rmsnorm(x, self.weight, self.eps, residual)
        return rmsnorm(hidden, self.weight, self.eps), hidden


class FinalNorm(RMSNorm):
    """The norm after the last layer."""

    def forward(self, hidden: Tensor | Addends) -> Tensor:
        """Returns only the normed hidden states."""
        return super().forward(hidden)[0]


class Layer(TransformerLayer):
    """One transformer layer. Takes hidden states as a tensor or as Addends; returns a tensor if `adds`, else Addends."""

    def __init__(self, *args: Any, adds: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.adds = adds

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor | Addends, attention_mask: Tensor | None = None, *, packed_seq_params: PackedForward, **_: Any
    ) -> tuple[Tensor | Addends, None]:
        """As megatron's, without a cross-attention context: returns (hidden states, None)."""
        normed, total = self.input_layernorm(hidden_states)
        addends = Addends(self.self_attention(normed, packed_seq_params=packed_seq_params)[0], total)
        normed, total = self.pre_mlp_layernorm(addends)
        out, _bias = checkpoint(self.mlp, False, normed) if self.recompute_mlp else self.mlp(normed)
        return (out + total if self.adds else Addends(out, total)), None
