"""What megatron-core calls `fused_weight_gradient_mlp_cuda`: a linear layer's weight gradient, added to its fp32 accumulator by the matrix
product itself. Without it the product is written in the weights' type, read again, and added in a second pass over the accumulator.

The name is Apex's, whose module does the same on GPUs. seat.py puts this one in its place where Apex's is not installed, and wherever
tensors are not on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_kernels.linear_logprob import multiply


def wgrad_gemm_accum_fp32(input_TI: Tensor, grad_TO: Tensor, main_grad_OI: Tensor) -> None:
    """main_grad_OI += grad_TO.T @ input_TI, summed in fp32.

    input_TI      [T, I], what the layer was given: float32, bfloat16 or float16
    grad_TO       [T, O], the gradient of what it returned, of the same type
    main_grad_OI  [O, I], float32
    """
    if input_TI.device.type == "cpu":  # no mixed-precision product there, and the seat's own for float32 is aten::mm
        main_grad_OI.add_(grad_TO.t().float().mm(input_TI.float()))
    else:
        multiply(main_grad_OI, grad_TO.t(), input_TI, add=True)


def wgrad_gemm_accum_fp16(input_TI: Tensor, grad_TO: Tensor, main_grad_OI: Tensor) -> None:
    """The same for an accumulator of the operands' own type."""
    main_grad_OI.addmm_(grad_TO.t(), input_TI)


class Accumulated(torch.autograd.Function):
    """The weight, for who adds its gradient to weight.main_grad and gives none to autograd.

    megatron's hook on a parameter, which starts the reduction of gradients, wants a .grad nevertheless. It gets a single zero in the
    weight's shape, where megatron's own layers allocate a whole one, and is told not to look at it. Where the embedding of this stage
    has the same weight, its gradient comes after us and is what the hook is to add.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, embeds: bool) -> Tensor:
        ctx.weight, ctx.embeds = weight, embeds
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: None) -> tuple[None, None]:  # type: ignore[override]
        assert grad is None
        if not ctx.embeds:
            ctx.weight.grad = ctx.weight.new_zeros(()).expand_as(ctx.weight)
            ctx.weight.grad_added_to_main_grad = True
        return None, None
