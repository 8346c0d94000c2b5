"""rmsnorm, swiglu and rope against float64, forward and backward: the same checks for the kernels and for the torch references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triton_kernels import rmsnorm, rope, rope_qkv, swiglu

EPS = 1e-5
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
Layer = Callable[..., Tensor | tuple[Tensor, ...]]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def passes(layer: Layer, inputs: Sequence[Tensor], seed: int = 9) -> list[Tensor]:
    """The outputs of `layer` and the gradient of each input, for random upstream gradients of the inputs' precision."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = layer(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # The same for every precision, and exact in all of them.
    upstream = [drawn(*output.shape, seed=seed + i, dtype=torch.bfloat16).to(output.dtype) for i, output in enumerate(outputs)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def check(layer: Layer, reference: Layer, inputs: Sequence[Tensor]) -> None:
    """Outputs and gradients of `layer` are those of `reference` in float64, within the tolerance of the first input's dtype."""
    expected = passes(reference, [tensor.double() for tensor in inputs])
    for actual, wanted in zip(passes(layer, inputs), expected, strict=True):
        assert actual.shape == wanted.shape
        assert actual.dtype == inputs[0].dtype
        if actual.numel():
            assert float((actual.double() - wanted).abs().max()) <= TOLERANCE[actual.dtype] * max(1.0, float(wanted.abs().max()))


def check_far_rows(layer: Layer, near: Tensor, folder: Path) -> None:
    """Rows 2^30 elements apart, so that offsets from the third row on do not fit in 32 bits, give the same bits as adjacent rows.

    The file is sparse: only the rows take space.
    """
    size = (len(near) - 1) * 2**30 + near[0].numel()
    stored = torch.from_file(str(folder / "rows"), shared=True, size=size, dtype=near.dtype)
    far = stored.as_strided(near.shape, (2**30, *near.stride()[1:]))
    far.copy_(near)
    for actual, expected in zip(passes(layer, [far]), passes(layer, [near]), strict=True):
        assert torch.equal(actual, expected)


def check_batch_invariance(layer: Layer, inputs: Sequence[Tensor]) -> None:
    """Each row has the same bits alone and among others, forward and backward, and in a second run."""

    def run(rows: slice) -> list[Tensor]:
        leaves = [tensor[rows].detach().requires_grad_() for tensor in inputs]
        output = layer(*leaves)
        assert isinstance(output, Tensor)
        return [output.detach(), *torch.autograd.grad(output.sum(), leaves[:1])]

    full = run(slice(None))
    for rows in (slice(None), *(slice(row, row + 1) for row in range(len(inputs[0])))):
        assert all(torch.equal(actual, expected[rows]) for actual, expected in zip(run(rows), full, strict=True))


def check_rmsnorm(rows: int, width: int, dtype: torch.dtype, fused: bool) -> None:
    x, weight, residual = drawn(rows, width), drawn(width, seed=1), drawn(rows, width, seed=2)
    # These sums are exact, because rounding of x + residual to bfloat16 is not an error of the norm.
    x, residual = (x * 8).round() / 8, (residual * 8).round() / 8
    inputs = [x, weight, residual] if fused else [x, weight]
    check(lambda x, weight, *rest: rmsnorm(x, weight, EPS, *rest), rmsnorm_reference, [tensor.to(dtype) for tensor in inputs])


def check_swiglu(tokens: int, width: int, dtype: torch.dtype) -> None:
    check(swiglu, swiglu_reference, [drawn(tokens, 2 * width, dtype=dtype) * 3])


def check_rope(tokens: int, heads: int, size: int, dtype: torch.dtype) -> None:
    cos, sin = angles(tokens, size)
    check(lambda x: rope(x, cos, sin), lambda x: rope_reference(x, cos, sin), [drawn(tokens, heads, size, dtype=dtype)])


def check_rope_qkv(tokens: int, groups: int, queries: int, size: int, dtype: torch.dtype) -> None:
    cos, sin = angles(tokens, size)

    def reference(qkv: Tensor) -> tuple[Tensor, ...]:
        query, key, value = qkv.split([queries, 1, 1], 2)
        return rope_reference(query.flatten(1, 2), cos, sin), rope_reference(key.flatten(1, 2), cos, sin), value.flatten(1, 2)

    check(lambda qkv: rope_qkv(qkv, cos, sin), reference, [drawn(tokens, groups, queries + 2, size, dtype=dtype)])


def angles(tokens: int, size: int) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, size / 2] of positions that restart within the batch, as in packed sequences."""
    turns = (torch.arange(tokens) % 5)[:, None] * 10000 ** -(torch.arange(0, size, 2) / size)
    return turns.cos(), turns.sin()


def rmsnorm_reference(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
    total = x if residual is None else x + residual
    normed = total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    return normed if residual is None else (normed, total)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair as a complex number, multiplied by e^(i angle)."""
    a, b = x.chunk(2, -1)
    turned = torch.complex(a, b) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat([turned.real, turned.imag], -1)
