"""megatron's tensor-parallel linear layers, extended by overlapped communication and by recomputation of SwiGLU in backward.

The settings are `parallel.tp_comm_overlap` and `parallel.recompute=swiglu`.

Only communication that megatron does not overlap is changed. In the backward of a column-parallel layer, megatron already overlaps the
all-gather of the input with the input's gradient, and the reduce-scatter of that with the weight's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.megatron import overlap
from engine.megatron.weight_gradient import Accumulated, wgrad_gemm_accum_fp32
from triton_kernels import swiglu


class ColumnLinear(ColumnParallelLinear):
    """[T / tp, 1, D] -> [T, 1, O / tp]; the all-gather of rows overlaps with the product."""

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """As megatron's. With fewer than LEAST_ROWS rows per rank, they are gathered before the product."""
        assert self.weight is not None
        if not self.config.tp_comm_overlap or len(input_) < overlap.LEAST_ROWS:
            return super().forward(input_)  # type: ignore[return-value]
        out = _Column.apply(input_.flatten(0, -2), *_accumulated(self.weight), self.tp_group)
        return out[:, None], None


class RowLinear(RowParallelLinear):
    """[T, 1, I / tp] -> [T / tp, 1, D]; the reduce-scatter of sums overlaps with the product."""

    recomputes = False

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """As megatron's. With fewer than LEAST_ROWS rows per rank, they are reduce-scattered after the product."""
        group: Any = self.tp_group
        if not self.config.tp_comm_overlap or len(input_) < overlap.LEAST_ROWS * group.size():
            return super().forward(input_)  # type: ignore[return-value]
        out = _Row.apply(input_.flatten(0, -2), *_accumulated(self.weight), group, self.recomputes)
        return out[:, None], None


class RecomputingLinear(RowLinear):
    """The MLP's second linear layer fused with SwiGLU: the input is gate_up, and SwiGLU's output is recomputed in backward."""

    recomputes = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._forward_impl = _recomputing  # type: ignore[method-assign]  # megatron communicates before and after it


def _recomputing(input: Tensor, weight: Tensor, **_: Any) -> Tensor:
    out = _Row.apply(input.flatten(0, -2), *_accumulated(weight), None, True)
    return out.view(*input.shape[:-1], -1)


def _accumulated(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """(weight, buffer that its gradient is added to). The buffer is None before optimizers.wrap_ddp; autograd then gets the gradient."""
    main_grad = getattr(weight, "main_grad", None)
    return (weight if main_grad is None else Accumulated.apply(weight, False)), main_grad


def _weight_gradient(input: Tensor, grad: Tensor, main_grad: Tensor | None) -> Tensor | None:
    if main_grad is None:
        return grad.t().mm(input)
    wgrad_gemm_accum_fp32(input, grad, main_grad)
    return None


class _Column(torch.autograd.Function):
    """all_gather(rows [T / n, D]) @ weight.T [D, O]. The weight's gradient is added to `main_grad` if it is given."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, main_grad: Tensor | None, group: ProcessGroup) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.main_grad, ctx.group = main_grad, group  # save_for_backward would object that other microbatches change main_grad
        return overlap.gather_multiply(rows, weight.t(), group, keep=False)[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        gathered, gathering = rows.new_empty(len(grad), rows.shape[1]), None
        if needs_weight:
            gathering = dist.all_gather_into_tensor(gathered, rows.contiguous(), group=ctx.group, async_op=True)
        partial = grad.mm(weight)
        if gathering is not None:
            gathering.wait()
        grad_rows = torch.empty_like(rows)
        scattering: Any = dist.reduce_scatter_tensor(grad_rows, partial, group=ctx.group, async_op=True)
        grad_weight = _weight_gradient(gathered, grad, ctx.main_grad) if needs_weight else None
        scattering.wait()
        return grad_rows, grad_weight, None, None


class _Row(torch.autograd.Function):
    """reduce_scatter(input [T, I] @ weight.T [I, D]) over `group`: [T / n, D]. Without a group, only the product.

    recomputes  the input is gate_up [T, 2 I]; SwiGLU of it is multiplied, and recomputed in backward
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, main_grad: Tensor | None, group: ProcessGroup | None, recomputes: bool) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.main_grad, ctx.group, ctx.recomputes = main_grad, group, recomputes
        rows = swiglu(input) if recomputes else input
        return rows.mm(weight.t()) if group is None else overlap.multiply_scatter(rows, weight.t(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        if ctx.group is None:
            grad_rows = grad.mm(weight)
        else:
            grad, grad_rows = overlap.gather_multiply(grad, weight, ctx.group, keep=True)  # type: ignore[assignment]
        if not ctx.recomputes:
            return grad_rows, _weight_gradient(input, grad, ctx.main_grad) if needs_weight else None, None, None, None
        with torch.enable_grad():
            leaf = input.detach().requires_grad_()
            rows = swiglu(leaf)
        (grad_input,) = torch.autograd.grad(rows, leaf, grad_rows)
        return grad_input, _weight_gradient(rows.detach(), grad, ctx.main_grad) if needs_weight else None, None, None, None
