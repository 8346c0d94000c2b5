"""Select and launch implementations: the Triton kernel on GPUs and in Triton's interpreter, the torch reference otherwise.

The only file that imports Triton for the kernels. Without Triton (macOS), kernels are plain functions that are never called.
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

    jit: Any = triton.jit  # Any, because type checkers see a kernel as a Python function and reject integers for constexprs
    constexpr = tl.constexpr
else:
    tl = None
    jit = constexpr = lambda value: value


def interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter. TRITON_INTERPRET must be set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def by_kernel(tensor: Tensor) -> bool:
    """Whether a kernel is used for `tensor`. Meta tensors are treated like tensors on a GPU."""
    device = tensor.device.type
    return device == "meta" or (tl is not None and (device == "cuda" or (device == "cpu" and interpreted())))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on `grid`, on the GPU of its first tensor. An empty grid, which CUDA rejects, does nothing."""
    if not all(grid):
        return
    index = next(argument for argument in arguments if isinstance(argument, Tensor)).get_device()
    if index < 0 or index == torch.cuda.current_device():
        kernel[grid](*arguments, **constants)
    else:
        with torch.cuda.device(index):
            kernel[grid](*arguments, **constants)


def shared_memory(tensor: Tensor) -> int:
    """Bytes of shared memory available to a block on the GPU of `tensor`; for other devices, those of sm_90."""
    return _shared_memory(tensor.device) if tensor.device.type == "cuda" else 227 << 10


@cache
def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def counter(like: Tensor) -> Tensor:
    """An int32 tensor of 0 on the device of `like`, in which a kernel's programs count themselves. The last program must reset it to 0.

    There is one per stream, because kernels of a stream run one after another. A graph being captured gets its own, because it may be
    replayed concurrently with other streams.
    """
    on_gpu = like.device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return like.new_zeros(1, dtype=torch.int32)
    return _counter(like.device, torch.cuda.current_stream(like.device).cuda_stream if on_gpu else 0)


@cache
def _counter(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
