"""Rotary position embedding (RoFormer, arXiv 2104.09864), in Llama's half-split layout: dimension i is paired with i + K/2.

    y[i]       = x[i] cos - x[i + K/2] sin
    y[i + K/2] = x[i + K/2] cos + x[i] sin

The inverse is the rotation by the negative angle, so backward uses the same kernel.

`rope_qkv` applies it to the output of the fused QKV projection, and splits that in the same launch. Query, key and value become separate
tensors, which attention saves for backward: no view keeps the whole projection output alive, and no further copy is needed.
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

PAIRS = 2048  # pairs per program: 8 to 16 per thread, in 128-bit loads


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` with each head's pairs (i, i + K/2) rotated by its token's angles; differentiable in `x`, not in the angles.

    x         [T, H, K], bfloat16, float16 or float32; K even; copied if the last dimension is not contiguous
    cos, sin  [T, K/2], any of these dtypes; packed sequences pass the angles of their own positions

    Returns [T, H, K] of x's dtype, computed in float32. Raises ValueError for other shapes and dtypes.
    """
    _check(x, cos, sin)
    return _rope(x, cos, sin, False)


def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split the output of a fused QKV projection, and rotate query and key as `rope` does; differentiable in `qkv`, not in the angles.

    qkv       [T, KV, G + 2, K], bfloat16, float16 or float32: for each KV head its G query heads, its key, its value; K even; copied if not
              contiguous within a token
    cos, sin  [T, K/2], any of these dtypes

    Returns query [T, KV * G, K], key [T, KV, K] and value [T, KV, K] of qkv's dtype, computed in float32. Raises ValueError for other
    shapes and dtypes.
    """
    check_float(qkv=qkv, cos=cos, sin=sin)
    if qkv.dim() != 4 or qkv.shape[2] < 3 or qkv.shape[3] % 2:
        raise ValueError(f"qkv has shape {list(qkv.shape)}; use [tokens, key-value heads, queries of each + 2, head size], the size even")
    _check_angles("qkv", qkv, cos, sin)
    return _rope_qkv(qkv, cos, sin)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_float(x=x, cos=cos, sin=sin)
    if x.dim() != 3 or x.shape[2] % 2:
        raise ValueError(f"x has shape {list(x.shape)}; use [tokens, heads, head size] with an even head size")
    _check_angles("x", x, cos, sin)


def _check_angles(of: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    for name, angles in (("cos", cos), ("sin", sin)):
        check_shape(name, angles, (x.shape[0], x.shape[-1] // 2), f"a row for each token of {of} and a column for each pair")
        check_device(name, angles, of, x)


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


@operator("rope_qkv")
def _rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    compute = _split_by_triton if by_kernel(qkv) else _split_reference
    return compute(qkv, cos, sin)


@_rope_qkv.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _new_parts(qkv)


@operator("rope_qkv_backward")
def _rope_qkv_backward(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of qkv from those of query, key and value."""
    compute = _join_by_triton if by_kernel(query) else _join_reference
    return compute(query, key, value, cos, sin)


@_rope_qkv_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _new_whole(query, key)


_rope_qkv.register_autograd(
    lambda ctx, *grads: (_rope_qkv_backward(*grads, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
)


def _new_parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, groups, shared, size = qkv.shape
    query = qkv.new_empty(tokens, groups * (shared - 2), size)
    return query, qkv.new_empty(tokens, groups, size), qkv.new_empty(tokens, groups, size)


def _new_whole(query: Tensor, key: Tensor) -> Tensor:
    tokens, groups, size = key.shape
    return query.new_empty(tokens, groups, query.shape[1] // groups + 2, size)


def _split_reference(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.split([qkv.shape[2] - 2, 1, 1], 2)
    value = value[:, :, 0].clone(memory_format=torch.contiguous_format)
    return _reference(query.flatten(1, 2), cos, sin, False), _reference(key[:, :, 0], cos, sin, False), value


def _join_reference(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    whole = _new_whole(query, key)
    whole[:, :, :-2] = _reference(query, cos, sin, True).view_as(whole[:, :, :-2])
    whole[:, :, -2] = _reference(key, cos, sin, True)
    whole[:, :, -1] = value
    return whole


def _reference(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    a, b = x.float().chunk(2, -1)
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    sin = -sin if inverse else sin
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


@jit
def _kernel(
    X, COS, SIN, Y, x_token, x_head, cos_token, sin_token, heads, half, INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """One program per token and HEADS of its heads."""
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


@jit
def _qkv_kernel(
    QKV, COS, SIN, QUERY, KEY, VALUE,
    qkv_token, cos_token, sin_token, query_token, query_head, key_token, key_head, value_token, value_head, heads, half,
    INVERSE: tl.constexpr, SHARED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program per token and HEADS of its heads in QKV, where each KV head has SHARED: its query heads, its key, its value. From QKV to
    query, key and value, or with INVERSE back."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    group, place = head // SHARED, head % SHARED
    inside = (head < heads) & (pair < half)
    of_query, of_key, of_value = inside & (place < SHARED - 2), inside & (place == SHARED - 2), inside & (place == SHARED - 1)
    whole = QKV + token * qkv_token + head * 2 * half + pair
    query = QUERY + token * query_token + (group * (SHARED - 2) + place) * query_head + pair
    key = KEY + token * key_token + group * key_head + pair
    value = VALUE + token * value_token + group * value_head + pair
    cos = load_row(COS + token * cos_token, pair, half)
    sin = load_row(SIN + token * sin_token, pair, half)
    if INVERSE:
        sin = -sin
        a = _from_one(query, key, value, of_query, of_key, of_value)
        b = _from_one(query + half, key + half, value + half, of_query, of_key, of_value)
    else:
        a = tl.load(whole, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(whole + half, mask=inside, other=0.0).to(tl.float32)
    stays = place == SHARED - 1
    c = tl.where(stays, a, a * cos - b * sin)
    d = tl.where(stays, b, b * cos + a * sin)
    if INVERSE:
        tl.store(whole, c, mask=inside)
        tl.store(whole + half, d, mask=inside)
    else:
        _to_one(query, key, value, of_query, of_key, of_value, c)
        _to_one(query + half, key + half, value + half, of_query, of_key, of_value, d)


@jit
def _from_one(query, key, value, of_query, of_key, of_value):
    """Loads each element from query, key or value."""
    x = tl.load(query, mask=of_query, other=0.0).to(tl.float32)
    x += tl.load(key, mask=of_key, other=0.0).to(tl.float32)
    return x + tl.load(value, mask=of_value, other=0.0).to(tl.float32)


@jit
def _to_one(query, key, value, of_query, of_key, of_value, x):
    tl.store(query, x, mask=of_query)
    tl.store(key, x, mask=of_key)
    tl.store(value, x, mask=of_value)


def _split_by_triton(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    qkv = qkv if qkv[:1].is_contiguous() else qkv.contiguous()
    split = _new_parts(qkv)
    _launch_qkv(qkv, split, cos, sin, inverse=False)
    return split


def _join_by_triton(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    whole = _new_whole(query, key)
    _launch_qkv(whole, (contiguous_rows(query), contiguous_rows(key), contiguous_rows(value)), cos, sin, inverse=True)
    return whole


def _launch_qkv(qkv: Tensor, split: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor, inverse: bool) -> None:
    tokens, groups, shared, size = qkv.shape
    cos, sin = contiguous_rows(cos), contiguous_rows(sin)
    heads = groups * shared
    shape, warps = _tile(heads, size // 2)
    strides = (qkv.stride(0), cos.stride(0), sin.stride(0), *(stride for part in split for stride in part.stride()[:2]))
    grid = (tokens, parts(heads, shape["HEADS"]))
    constants = {"INVERSE": inverse, "SHARED": shared, **shape}
    launch(_qkv_kernel, grid, qkv, cos, sin, *split, *strides, heads, size // 2, **constants, num_warps=warps)


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
    """(heads and pairs per program, its warps): as many of a token's heads as fit in PAIRS."""
    pairs = power_of_2(half)
    tile = min(power_of_2(heads), max(1, PAIRS // pairs))
    return {"HEADS": tile, "HALF": pairs}, max(1, min(8, tile * pairs // 256))


def aot_cases() -> list[AotCase]:
    """Head size 128 (Llama 8B and up) and 64 (135M), and a tensor-parallel rank of four heads. QKV of 8B, and of 405B at tp=8."""
    shapes = ((32, 128, "bf16"), (4, 128, "bf16"), (9, 64, "bf16"), (32, 128, "fp32"))
    products = ((8, 4, 128, "bf16"), (1, 16, 128, "bf16"), (3, 3, 64, "bf16"), (8, 4, 128, "fp32"))
    return [
        *(_case(f"rope {heads}x{size} {dtype}", heads, size, dtype) for heads, size, dtype in shapes),
        *(_qkv_case(*product, inverse) for product in products for inverse in (False, True)),
    ]


def _case(name: str, heads: int, size: int, dtype: str) -> AotCase:
    shape, warps = _tile(heads, size // 2)
    pointers = ("X", "COS", "SIN", "Y")
    sizes = ("x_token", "x_head", "cos_token", "sin_token", "half")
    signature = {**dict.fromkeys(pointers, f"*{dtype}"), **dict.fromkeys((*sizes, "heads"), "i32")}
    return AotCase(name, _kernel, signature, {"INVERSE": False, **shape}, (*pointers, *sizes), warps)


def _qkv_case(groups: int, queries: int, size: int, dtype: str, inverse: bool) -> AotCase:
    heads = groups * (queries + 2)
    shape, warps = _tile(heads, size // 2)
    constants = {"INVERSE": inverse, "SHARED": queries + 2, **shape}
    arguments = [name for name in _qkv_kernel.arg_names if name not in constants]
    signature = {name: f"*{dtype}" if name.isupper() else "i32" for name in arguments}
    name = f"rope_qkv {'backward' if inverse else 'forward'} {groups}x{queries}x{size} {dtype}"
    return AotCase(name, _qkv_kernel, signature, constants, tuple(name for name in arguments if name != "heads"), warps)
