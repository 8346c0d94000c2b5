"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split pairing of Llama: dimension i turns with i + K/2.

    y[i]       = x[i] cos - x[i + K/2] sin
    y[i + K/2] = x[i + K/2] cos + x[i] sin

Turning back is turning by the negative angle, so the backward pass is the same kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_kernels.aot import AotCase
from triton_kernels.checks import check_device, check_float, check_shape
from triton_kernels.launch import by_kernel, jit, launch, tl
from triton_kernels.operator import operator
from triton_kernels.tiles import contiguous_rows, load_row, parts, power_of_2

PAIRS = 2048  # of one program: 8 to 16 a thread, in 128-bit loads


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` with each head's pairs (i, i + K/2) turned by its token's angles; differentiable in `x`, not in the angles.

    x         [T, H, K], bfloat16, float16 or float32; K even, the last dimension contiguous or it is copied
    cos, sin  [T, K/2], of any of these types: packed sequences bring the angles of their own positions

    Returns [T, H, K] of x's dtype, computed in float32. ValueError for other shapes and dtypes.
    """
    _check(x, cos, sin)
    return _rope(x, cos, sin, False)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_float(x=x, cos=cos, sin=sin)
    if x.dim() != 3 or x.shape[2] % 2:
        raise ValueError(f"x has shape {list(x.shape)}; use [tokens, heads, head size] with an even head size")
    for name, angles in (("cos", cos), ("sin", sin)):
        check_shape(name, angles, (x.shape[0], x.shape[2] // 2), "a row for each token of x and a column for each pair")
        check_device(name, angles, "x", x)


@operator("rope")
def _rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return _by_triton(x, cos, sin, inverse) if by_kernel(x) else _reference(x, cos, sin, inverse)


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    cos, sin = ctx.saved_tensors
    return _rope(grad, cos, sin, not ctx.inverse), None, None, None


_rope.register_autograd(_backward, setup_context=_save)


def _reference(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    a, b = x.float().chunk(2, -1)
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    sin = -sin if inverse else sin
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


@jit
def _kernel(
    X, COS, SIN, Y, x_token, x_head, cos_token, sin_token, heads, half, INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """One token and HEADS of its heads a program."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (pair < half)
    cos = load_row(COS + token * cos_token, pair, half)
    sin = load_row(SIN + token * sin_token, pair, half)
    if INVERSE:
        sin = -sin
    x = X + token * x_token + head * x_head + pair
    a = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + half, mask=inside, other=0.0).to(tl.float32)
    y = Y + (token * heads + head) * 2 * half + pair
    tl.store(y, a * cos - b * sin, mask=inside)
    tl.store(y + half, b * cos + a * sin, mask=inside)


def _by_triton(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    tokens, heads, size = x.shape
    x, cos, sin = contiguous_rows(x), contiguous_rows(cos), contiguous_rows(sin)
    y = x.new_empty(x.shape)
    shape, warps = _tile(heads, size // 2)
    strides = (x.stride(0), x.stride(1), cos.stride(0), sin.stride(0))
    grid = (tokens, parts(heads, shape["HEADS"]))
    launch(_kernel, grid, x, cos, sin, y, *strides, heads, size // 2, INVERSE=inverse, **shape, num_warps=warps)
    return y


def _tile(heads: int, half: int) -> tuple[dict[str, int], int]:
    """(heads and pairs of one program, its warps): a token's heads, as far as they fit PAIRS."""
    pairs = power_of_2(half)
    tile = min(power_of_2(heads), max(1, PAIRS // pairs))
    return {"HEADS": tile, "HALF": pairs}, max(1, min(8, tile * pairs // 256))


def aot_cases() -> list[AotCase]:
    """Heads of 128 (Llama 8B and up), of 64 (135M), and a tensor-parallel rank's four."""
    return [_case(f"rope {heads}x{size} {dtype}", heads, size, dtype) for heads, size, dtype in
            ((32, 128, "bf16"), (4, 128, "bf16"), (9, 64, "bf16"), (32, 128, "fp32"))]  # fmt: skip


def _case(name: str, heads: int, size: int, dtype: str) -> AotCase:
    shape, warps = _tile(heads, size // 2)
    pointers = ("X", "COS", "SIN", "Y")
    sizes = ("x_token", "x_head", "cos_token", "sin_token", "half")
    signature = {**dict.fromkeys(pointers, f"*{dtype}"), **dict.fromkeys((*sizes, "heads"), "i32")}
    return AotCase(name, _kernel, signature, {"INVERSE": False, **shape}, (*pointers, *sizes), warps)
