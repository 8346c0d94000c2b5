"""SwiGLU between the two products of an MLP: kept for the second one's weight gradient, or computed again when that needs it.

What SwiGLU reads is kept in either case, for its own backward. Its output is half as large, one product's input, and cheap to make again:
one pass over memory instead of the product and all that selective recomputation repeats.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer import MegatronModule
from torch import Tensor

from engine.megatron.weight_gradient import Accumulated, wgrad_gemm_accum_fp32
from triton_kernels import swiglu


class SwiGLU(MegatronModule):
    """silu(gate) * up, of the rows that linear_fc1 leaves: each rank's gates, then its ups."""

    def forward(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up.flatten(0, -2)).view(*gate_up.shape[:-1], -1)


class Unchanged(MegatronModule):
    """Stands where the activation function does, before a product that computes it itself."""

    def forward(self, gate_up: Tensor) -> Tensor:
        return gate_up


class RecomputingLinear(RowParallelLinear):
    """The MLP's second product, of SwiGLU(gate_up), which it computes again for its weight gradient instead of keeping it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._forward_impl = _product  # type: ignore[method-assign]  # between megatron's communication on both sides of it


def _product(input: Tensor, weight: Tensor, **_: Any) -> Tensor:
    main_grad = getattr(weight, "main_grad", None)  # there once training.py has wrapped the model
    return _Product.apply(input, weight if main_grad is None else Accumulated.apply(weight, False), main_grad)


class _Product(torch.autograd.Function):
    """SwiGLU(gate_up [..., 2 F]) @ weight.T [F, D]; the weight's gradient is added to `main_grad` where there is one."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, main_grad: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        ctx.main_grad = main_grad  # not saved: other microbatches add to it before our turn
        out = swiglu(gate_up.flatten(0, -2)).mm(weight.t())
        return out.view(*gate_up.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        gate_up, weight = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        with torch.enable_grad():
            leaf = gate_up.detach().flatten(0, -2).requires_grad_()
            out = swiglu(leaf)
        (to_gate_up,) = torch.autograd.grad(out, leaf, grad.mm(weight))
        to_weight = None
        if ctx.needs_input_grad[1] and ctx.main_grad is None:
            to_weight = grad.t().mm(out.detach())
        elif ctx.needs_input_grad[1]:
            wgrad_gemm_accum_fp32(out.detach(), grad, ctx.main_grad)
        return to_gate_up.view(gate_up.shape), to_weight, None
