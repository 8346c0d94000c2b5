"""SwiGLU (arXiv 2002.05202): silu(gate) * up, where silu(g) = g / (1 + exp(-g)), in one kernel forward and one backward.

    d gate = dy * up * s * (1 + gate * (1 - s))        d up = dy * gate * s        s = 1 / (1 + exp(-gate))

Only the input is saved for backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.aot import AotCase
from triton_kernels.checks import check_float
from triton_kernels.launch import by_kernel, jit, launch, tl
from triton_kernels.operator import operator
from triton_kernels.tiles import contiguous_rows, load_row, parts

BLOCK, WARPS = 2048, 4  # 16 elements per thread, in 128-bit loads


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of each row; gate is its first half, up its second.

    gate_up  [T, 2F], bfloat16, float16 or float32; copied if the last dimension is not contiguous

    Returns [T, F] of the same dtype, computed in float32. Raises ValueError for other shapes and dtypes.
    """
    check_float(gate_up=gate_up)
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has shape {list(gate_up.shape)}; use [tokens, 2 * width], gate columns first")
    return _forward(gate_up)


@operator("swiglu")
def _forward(gate_up: Tensor) -> Tensor:
    compute = _forward_by_triton if by_kernel(gate_up) else _forward_reference
    return compute(contiguous_rows(gate_up))


@_forward.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@operator("swiglu_backward")
def _backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    compute = _backward_by_triton if by_kernel(gate_up) else _backward_reference
    return compute(contiguous_rows(grad), contiguous_rows(gate_up))


@_backward.register_fake
def _(grad: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


_forward.register_autograd(
    lambda ctx, grad: _backward(grad, *ctx.saved_tensors), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def _forward_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _backward_reference(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    grad = grad.float()
    out = torch.empty(gate_up.shape, dtype=torch.float32, device=gate_up.device)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=out[:, : gate.shape[1]])
    torch.mul(grad, F.silu(gate), out=out[:, gate.shape[1] :])
    return out.to(gate_up.dtype)


@jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))  # the exponent is at most 0, so exp cannot overflow
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@jit
def _forward_kernel(GATE_UP, Y, stride, width, BLOCK: tl.constexpr):
    """One program per tile of a row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = load_row(GATE_UP + row * stride, cols, width)
    up = load_row(GATE_UP + row * stride + width, cols, width)
    tl.store(Y + row * width + cols, gate * _sigmoid(gate) * up, mask=cols < width)


@jit
def _backward_kernel(GRAD, GATE_UP, OUT, grad_stride, stride, width, BLOCK: tl.constexpr):
    """One program per tile of a row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = load_row(GATE_UP + row * stride, cols, width)
    up = load_row(GATE_UP + row * stride + width, cols, width)
    grad = load_row(GRAD + row * grad_stride, cols, width)
    share = _sigmoid(gate)
    out = OUT + row * 2 * width + cols
    tl.store(out, grad * up * share * (1.0 + gate * (1.0 - share)), mask=cols < width)
    tl.store(out + width, grad * gate * share, mask=cols < width)


def _forward_by_triton(gate_up: Tensor) -> Tensor:
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(tokens, width)
    launch(_forward_kernel, _grid(tokens, width), gate_up, y, gate_up.stride(0), width, BLOCK=BLOCK, num_warps=WARPS)
    return y


def _backward_by_triton(grad: Tensor, gate_up: Tensor) -> Tensor:
    tokens, width = grad.shape
    out = gate_up.new_empty(gate_up.shape)
    strides = (grad.stride(0), gate_up.stride(0))
    launch(_backward_kernel, _grid(tokens, width), grad, gate_up, out, *strides, width, BLOCK=BLOCK, num_warps=WARPS)
    return out


def _grid(tokens: int, width: int) -> tuple[int, int]:
    return tokens, parts(width, BLOCK)


def aot_cases() -> list[AotCase]:
    """Forward and backward, in bfloat16 and in float32, whose tiles take twice the bytes."""
    forward, backward = ("GATE_UP", "Y", "stride", "width"), ("GRAD", "GATE_UP", "OUT", "grad_stride", "stride", "width")
    return [
        AotCase(f"swiglu {name} {dtype}", kernel, _signature(arguments, dtype), {"BLOCK": BLOCK}, arguments, WARPS)
        for dtype in ("bf16", "fp32")
        for name, kernel, arguments in (("forward", _forward_kernel, forward), ("backward", _backward_kernel, backward))
    ]


def _signature(arguments: tuple[str, ...], dtype: str) -> dict[str, str]:
    return {name: f"*{dtype}" if name.isupper() else "i32" for name in arguments}
