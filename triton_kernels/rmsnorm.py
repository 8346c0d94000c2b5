"""RMSNorm (arXiv 1910.07467), with the residual addition fused.

    total = x + residual        rstd = 1 / sqrt(mean(total^2) + eps)        y = total * rstd * weight

    d total = rstd * (g - n * mean(g * n)) + the gradient of total from other uses        n = total * rstd        g = dy * weight
    d weight = sum over rows of dy * n

`total` is rounded to its dtype before the norm, so the fused result is bitwise that of the two separate operations. The order of the sum
over rows depends only on the number of rows: consecutive rows within a program, then the programs in order.

Rows of up to WIDEST bytes are held in registers. Wider rows are processed in tiles, and backward takes two launches: mean(g * n) of every
row, then tiles of d total with their columns of d weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from triton_kernels.aot import CHIPS, AotCase
from triton_kernels.checks import check_device, check_float, check_like, check_shape
from triton_kernels.launch import by_kernel, jit, launch, shared_memory, tl
from triton_kernels.operator import operator
from triton_kernels.tiles import contiguous_rows, load_row, parts, power_of_2

PARTS = 256  # programs of the backward kernel: enough to fill a GPU, few enough that their partial sums cost little traffic
WIDEST = 32768  # most bytes of a row held in registers: 16384 columns of bfloat16, the hidden size of Llama 405B
TILE = 4096  # columns of a wider row at a time


@overload
def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
@overload
def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm of `x`, or of x + residual, times `weight`; differentiable in all three tensors.

    x         [..., D], bfloat16, float16 or float32; copied if the last dimension is not contiguous
    weight    [D], any of these dtypes
    eps       added to the mean square
    residual  like x

    Returns the normed rows, with x's shape and dtype; with a residual, (normed, x + residual). Computed in float32.
    Raises ValueError for other shapes and dtypes.
    """
    _check(x, weight, residual)
    width = x.shape[-1]
    normed, total, _ = _forward(x.reshape(-1, width), None if residual is None else residual.reshape(-1, width), weight, eps)
    return normed.view(x.shape) if residual is None else (normed.view(x.shape), total.view(x.shape))


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    check_float(x=x, weight=weight)
    if not x.dim() or not x.shape[-1]:
        raise ValueError(f"x has shape {list(x.shape)}; use [..., width] with a width of at least 1")
    check_shape("weight", weight, (x.shape[-1],), "as wide as x")
    check_device("weight", weight, "x", x)
    if residual is not None:
        check_like("residual", residual, "x", x)


@operator("rmsnorm")
def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normed [N, D], total [N, D] or [0] without a residual, rstd [N])."""
    compute = _forward_by_triton if by_kernel(x) else _forward_reference
    return compute(contiguous_rows(x), None if residual is None else contiguous_rows(residual), weight.contiguous(), eps)


@_forward.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@operator("rmsnorm_backward")
def _backward(grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of total [N, D], of weight [D])."""
    compute = _backward_by_triton if by_kernel(total) else _backward_reference
    grad_total = None if grad_total is None else contiguous_rows(grad_total)
    return compute(contiguous_rows(grad), grad_total, contiguous_rows(total), weight.contiguous(), rstd)


@_backward.register_fake
def _(grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _ = inputs
    _, total, rstd = output
    ctx.fused = residual is not None
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)  # no zeros for the gradient of an unused total
    ctx.save_for_backward(total if ctx.fused else x, weight, rstd)


def _grads(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:  # the normed output is unused
        return grad_total, grad_total, None, None
    grad_input, grad_weight = _backward(grad, grad_total if ctx.fused else None, *ctx.saved_tensors)
    return grad_input, grad_input if ctx.fused else None, grad_weight, None


_forward.register_autograd(_grads, setup_context=_save)


def _forward_reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x if residual is None else x + residual
    rows = total.float()
    rstd = torch.rsqrt(rows.square().mean(-1) + eps)
    normed = (rows * rstd[:, None] * weight.float()).to(x.dtype)
    return normed, x.new_empty(0) if residual is None else total, rstd


def _backward_reference(grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    normed = total.float() * rstd[:, None]
    to_weight = (grad.float() * normed).sum(0)
    scaled = grad.float() * weight.float()
    to_total = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd[:, None]
    if grad_total is not None:
        to_total += grad_total
    return to_total.to(total.dtype), to_weight.to(weight.dtype)


@jit
def _forward_kernel(X, RESIDUAL, WEIGHT, Y, TOTAL, RSTD, x_stride, residual_stride, width, eps, BLOCK: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    x = load_row(X + row * x_stride, cols, width)
    if RESIDUAL is not None:
        total = (x + load_row(RESIDUAL + row * residual_stride, cols, width)).to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + row * width + cols, total, mask=cols < width)
        x = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(Y + row * width + cols, x * rstd * load_row(WEIGHT, cols, width), mask=cols < width)
    tl.store(RSTD + row, rstd)


@jit
def _backward_kernel(
    GRAD, GRAD_TOTAL, TOTAL, WEIGHT, RSTD, OUT, PARTIAL, grad_stride, grad_total_stride, total_stride, rows, rows_each, width,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per `rows_each` consecutive rows; its part of the weight's gradient is a row of PARTIAL."""
    part = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    to_weight = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(part * rows_each, tl.minimum(part * rows_each + rows_each, rows), num_stages=STAGES):
        rstd = tl.load(RSTD + row)
        # Rows are read twice, the second time from cache: a wide row and its part of the weight's gradient do not both fit in registers.
        total = load_row(TOTAL + row * total_stride, cols, width, "evict_last")
        scaled = load_row(GRAD + row * grad_stride, cols, width, "evict_last") * load_row(WEIGHT, cols, width, "evict_last")
        along = tl.sum(scaled * total, 0) * rstd / width
        normed = load_row(TOTAL + row * total_stride, cols, width, "evict_first") * rstd
        grad = load_row(GRAD + row * grad_stride, cols, width, "evict_first")
        to_weight += grad * normed
        out = (grad * load_row(WEIGHT, cols, width) - normed * along) * rstd
        if GRAD_TOTAL is not None:
            out += load_row(GRAD_TOTAL + row * grad_total_stride, cols, width)
        tl.store(OUT + row * width + cols, out, mask=cols < width)
    tl.store(PARTIAL + part * width + cols, to_weight, mask=cols < width)


@jit
def _wide_forward_kernel(X, RESIDUAL, WEIGHT, Y, TOTAL, RSTD, x_stride, residual_stride, width, eps, BLOCK: tl.constexpr):
    """One program per row, which is read twice, the second time from cache."""
    row = tl.program_id(0).to(tl.int64)
    square = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        x = _total(X, RESIDUAL, Y, row, x_stride, residual_stride, first + tl.arange(0, BLOCK), width)
        square += x * x
    rstd = tl.rsqrt(tl.sum(square, 0) / width + eps)
    tl.store(RSTD + row, rstd)
    for first in range(0, width, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = _total(X, RESIDUAL, Y, row, x_stride, residual_stride, cols, width)
        if RESIDUAL is not None:
            tl.store(TOTAL + row * width + cols, x, mask=cols < width)
        tl.store(Y + row * width + cols, x * rstd * load_row(WEIGHT, cols, width), mask=cols < width)


@jit
def _total(X, RESIDUAL, Y, row, x_stride, residual_stride, cols, width):
    """x + residual, rounded to the stored dtype."""
    x = load_row(X + row * x_stride, cols, width)
    if RESIDUAL is not None:
        x = (x + load_row(RESIDUAL + row * residual_stride, cols, width)).to(Y.dtype.element_ty).to(tl.float32)
    return x


@jit
def _along_kernel(GRAD, TOTAL, WEIGHT, RSTD, ALONG, grad_stride, total_stride, width, BLOCK: tl.constexpr):
    """mean(g * n), one program per row."""
    row = tl.program_id(0).to(tl.int64)
    along = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        scaled = load_row(GRAD + row * grad_stride, cols, width) * load_row(WEIGHT, cols, width)
        along += scaled * load_row(TOTAL + row * total_stride, cols, width)
    tl.store(ALONG + row, tl.sum(along, 0) * tl.load(RSTD + row) / width)


@jit
def _wide_backward_kernel(
    GRAD, GRAD_TOTAL, TOTAL, WEIGHT, RSTD, ALONG, OUT, PARTIAL, grad_stride, grad_total_stride, total_stride, rows, rows_each, width,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per tile of `rows_each` consecutive rows."""
    part = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    weight = load_row(WEIGHT, cols, width)
    to_weight = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(part * rows_each, tl.minimum(part * rows_each + rows_each, rows), num_stages=STAGES):
        rstd = tl.load(RSTD + row)
        normed = load_row(TOTAL + row * total_stride, cols, width) * rstd
        grad = load_row(GRAD + row * grad_stride, cols, width)
        to_weight += grad * normed
        out = (grad * weight - normed * tl.load(ALONG + row)) * rstd
        if GRAD_TOTAL is not None:
            out += load_row(GRAD_TOTAL + row * grad_total_stride, cols, width)
        tl.store(OUT + row * width + cols, out, mask=cols < width)
    tl.store(PARTIAL + part * width + cols, to_weight, mask=cols < width)


def _forward_by_triton(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape
    normed, rstd = x.new_empty(rows, width), x.new_empty(rows, dtype=torch.float32)
    total = x.new_empty(0) if residual is None else x.new_empty(rows, width)
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    kernel = _wide_forward_kernel if _wide(x) else _forward_kernel
    launch(kernel, (rows,), x, residual, weight, normed, total, rstd, *strides, width, eps, **_tile(x))
    return normed, total, rstd


def _backward_by_triton(grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = total.shape
    rows_each = max(1, parts(rows, PARTS))
    programs = parts(rows, rows_each)
    out = total.new_empty(rows, width)
    partial = total.new_empty(programs, width, dtype=torch.float32)
    inputs, outputs = (grad, grad_total, total, weight, rstd), (out, partial)
    sizes = (grad.stride(0), 0 if grad_total is None else grad_total.stride(0), total.stride(0), rows, rows_each, width)
    if _wide(total):
        along = torch.empty_like(rstd)
        launch(_along_kernel, (rows,), grad, total, weight, rstd, along, grad.stride(0), total.stride(0), width, **_tile(total))
        launch(_wide_backward_kernel, (programs, parts(width, TILE)), *inputs, along, *outputs, *sizes, **_tile(total), STAGES=2)
    else:
        stages = _stages(width, max(total.element_size(), weight.element_size()), shared_memory(total))
        launch(_backward_kernel, (programs,), *inputs, *outputs, *sizes, **_tile(total), STAGES=stages)
    return out, partial.sum(0).to(weight.dtype)


def _wide(x: Tensor) -> bool:
    return x.shape[1] * x.element_size() > WIDEST


def _tile(x: Tensor) -> dict[str, int]:
    """A whole row if it is held in registers (16 elements per thread, 32 for the widest), else a tile (16 per thread)."""
    block = TILE if _wide(x) else power_of_2(x.shape[1])
    return {"BLOCK": block, "num_warps": min(max(1, block // 512), 16)}


def _stages(width: int, itemsize: int, shared: int) -> int:
    """2 if two rows fit in `shared` bytes, so that the next row is loaded during computation; else 1."""
    return 2 if 7 * power_of_2(width) * itemsize + 1024 <= shared else 1  # 7 tiles: the inputs and scratch memory of the reductions


def aot_cases() -> list[AotCase]:
    """The hidden sizes of the 135M, 8B, 70B and 405B models in bfloat16 with residual, one without, and the widest that fits in float32.
    Then rows too wide for registers: 405B's in float32, and 65536 columns."""
    held = [(width, "bf16", True) for width in (576, 4096, 8192, 16384)] + [(4096, "bf16", False), (8192, "fp32", True)]
    wide = [(65536, "bf16", True), (16384, "fp32", True)]
    in_tiles = (_wide_forward_kernel, _along_kernel, _wide_backward_kernel)
    return [
        *(_case(_forward_kernel, *shape) for shape in held),
        *(case for shape in held for case in _backward_cases(*shape)),
        *(_case(kernel, *shape, stages=2) for shape in wide for kernel in in_tiles),
    ]


def _backward_cases(width: int, dtype: str, fused: bool) -> list[AotCase]:
    """One case for the architectures on which the next row is prefetched, one for the others."""
    archs: dict[int, list[int]] = {}
    for arch, chip in CHIPS.items():
        archs.setdefault(_stages(width, 4 if dtype == "fp32" else 2, chip.shared_of_block), []).append(arch)
    cases = {stages: _case(_backward_kernel, width, dtype, fused, stages) for stages in archs}
    return [
        replace(case, name=f"{case.name}{'' if stages == 2 else ' not ahead'}", archs=tuple(archs[stages]))
        for stages, case in cases.items()
    ]


def _case(kernel: Any, width: int, dtype: str, fused: bool, stages: int = 1) -> AotCase:
    absent = () if fused else ("RESIDUAL", "TOTAL") if kernel is _forward_kernel else ("GRAD_TOTAL",)
    types = {"RSTD": "*fp32", "ALONG": "*fp32", "PARTIAL": "*fp32", "eps": "fp32"}
    arguments = [name for name in kernel.arg_names if name not in (*absent, "BLOCK", "STAGES")]
    signature = {name: types.get(name, f"*{dtype}" if name.isupper() else "i32") for name in arguments}
    divisible = tuple(name for name in arguments if name not in ("rows", "rows_each", "eps"))
    tile = _tile(torch.empty(1, width, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, device="meta"))
    warps = tile.pop("num_warps")
    step = kernel.__name__.strip("_").removeprefix("wide_").removesuffix("_kernel")
    name = f"rmsnorm {step} {'fused ' if fused else ''}{width} {dtype}"
    staged = {"STAGES": stages} if "STAGES" in kernel.arg_names else {}
    constants = {**dict.fromkeys(absent), **tile, **staged}
    return AotCase(name, kernel, signature, constants, divisible, warps, prefetches=staged.get("STAGES", 1) > 1)
