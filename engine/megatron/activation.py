"""SwiGLU between the two linear layers of an MLP. Its output is saved for the second layer's weight gradient, or recomputed in backward.

SwiGLU's input is saved in both cases, for its own backward. Its output is half as large and cheap to recompute: one pass over memory, where
selective recomputation repeats the first layer's product as well.
"""

from __future__ import annotations

from megatron.core.transformer import MegatronModule
from torch import Tensor

from triton_kernels import swiglu


class SwiGLU(MegatronModule):
    """silu(gate) * up; the input is linear_fc1's output [T, 1, 2 I / tp], this rank's gate columns first."""

    def forward(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up.flatten(0, -2)).view(*gate_up.shape[:-1], -1)


class Unchanged(MegatronModule):
    """The identity, as activation function before linear.RecomputingLinear, which computes SwiGLU itself."""

    def forward(self, gate_up: Tensor) -> Tensor:
        return gate_up
