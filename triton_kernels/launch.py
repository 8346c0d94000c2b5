"""How a public function computes: by its Triton kernel on GPUs and in Triton's interpreter, by its torch reference elsewhere.

The only file that imports Triton for the kernels: where there is none (macOS), they are functions that nobody calls.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING or find_spec("triton"):
    import triton
    import triton.language as tl

    jit: Any = triton.jit  # as Any: to a type checker a kernel is a Python function, called with integers for constexprs
    constexpr = tl.constexpr
else:
    tl = None
    jit = constexpr = lambda anything: anything


def interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter. TRITON_INTERPRET must be set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def by_kernel(tensor: Tensor) -> bool:
    """Whether work on `tensor` is done by a kernel. Meta tensors, on which nothing is, stand for those of a GPU."""
    place = tensor.device.type
    return place == "meta" or (tl is not None and (place == "cuda" or (place == "cpu" and interpreted())))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on `grid`, on the GPU of its first tensor; the grid may have nothing in it, which is an error to a GPU."""
    if not all(grid):
        return
    index = next(each for each in arguments if isinstance(each, Tensor)).get_device()
    if index < 0 or index == torch.cuda.current_device():
        kernel[grid](*arguments, **constants)
    else:
        with torch.cuda.device(index):
            kernel[grid](*arguments, **constants)


def shared_memory(tensor: Tensor) -> int:
    """Bytes of shared memory that a block may have on the GPU of `tensor`; elsewhere, where nothing is short of it, those of sm_90."""
    return _shared_memory(tensor.device) if tensor.device.type == "cuda" else 227 << 10


@cache
def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def counter(like: Tensor) -> Tensor:
    """An int32 of 0 on the device of `like`, for a kernel whose programs count themselves there: the last one sets it back to 0.

    One for each stream, whose kernels run one after the other. A captured graph, which may run beside others, gets its own.
    """
    on_gpu = like.device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return like.new_zeros(1, dtype=torch.int32)
    return _counter(like.device, torch.cuda.current_stream(like.device).cuda_stream if on_gpu else 0)


@cache
def _counter(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
