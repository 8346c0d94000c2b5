"""Weight gradients of linear layers, added to the fp32 accumulator by the matrix product itself.

Without it, the product is written in the weights' dtype, read again, and added in a second pass over the accumulator. megatron-core expects
this interface from Apex's module `fused_weight_gradient_mlp_cuda`; backend.py replaces that module by this one if Apex is not installed or
tensors are not on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_kernels.linear_logprob import multiply


def wgrad_gemm_accum_fp32(input_TI: Tensor, grad_TO: Tensor, main_grad_OI: Tensor) -> None:
    """main_grad_OI += grad_TO.T @ input_TI, summed in fp32.

    input_TI      [T, I], the layer's input: float32, bfloat16 or float16
    grad_TO       [T, O], the gradient of its output, of the same dtype
    main_grad_OI  [O, I], float32
    """
    if input_TI.device.type == "cpu":  # torch has no mixed-precision product on CPU; onednn.py overrides aten::mm for float32
        main_grad_OI.add_(grad_TO.t().float().mm(input_TI.float()))
    else:
        multiply(main_grad_OI, grad_TO.t(), input_TI, add=True)


def wgrad_gemm_accum_fp16(input_TI: Tensor, grad_TO: Tensor, main_grad_OI: Tensor) -> None:
    """The same for an accumulator of the operands' dtype."""
    main_grad_OI.addmm_(grad_TO.t(), input_TI)


class Accumulated(torch.autograd.Function):
    """The weight, for an operation that adds the weight's gradient to weight.main_grad and returns none to autograd.

    megatron's parameter hook, which starts gradient reduction, needs a .grad anyway. It gets one zero expanded to the weight's shape
    (megatron's own layers allocate a full tensor), and grad_added_to_main_grad tells it not to add that.
    With `embeds`, this stage's embedding shares the weight: its gradient comes later, and the hook must add it.
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
