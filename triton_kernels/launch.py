"""How a public function computes: by its Triton kernel on GPUs and in Triton's interpreter, by its torch reference elsewhere."""

from __future__ import annotations

import os
from typing import Any

import triton
from torch import Tensor

jit: Any = triton.jit  # as Any: to a type checker a kernel is a Python function, called with integers for constexprs


def interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter. TRITON_INTERPRET must be set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def by_kernel(tensor: Tensor) -> bool:
    """Whether work on `tensor` is done by a kernel."""
    return tensor.device.type == "cuda" or (tensor.device.type == "cpu" and interpreted())


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on `grid`, which may have nothing in it: an empty grid is an error to a GPU."""
    if all(grid):
        kernel[grid](*arguments, **constants)
