"""SwiGLU between the two products of an MLP: kept for the second one's weight gradient, or computed again when that needs it.

What SwiGLU reads is kept in either case, for its own backward. Its output is half as large, one product's input, and cheap to make again:
one pass over memory instead of the product and all that selective recomputation repeats.
"""

from __future__ import annotations

from megatron.core.transformer import MegatronModule
from torch import Tensor

from triton_kernels import swiglu


class SwiGLU(MegatronModule):
    """silu(gate) * up, of the rows that linear_fc1 leaves: each rank's gates, then its ups."""

    def forward(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up.flatten(0, -2)).view(*gate_up.shape[:-1], -1)


class Unchanged(MegatronModule):
    """Stands where the activation function does, before a product that computes it itself: linear.RecomputingLinear."""

    def forward(self, gate_up: Tensor) -> Tensor:
        return gate_up
