"""Bad input answered in one line, before any kernel sees it. None of these looks at a value, so none waits for a device."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_float(**tensors: Tensor) -> None:
    """ValueError for a tensor whose dtype no kernel computes on."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} has dtype {_short(tensor.dtype)}; use bfloat16, float16 or float32")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    """ValueError where `tensor` is not of `shape`; `why` says what asks for it, such as "as x is"."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)} where {list(shape)} is needed, {why}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError where `tensor` has not the shape, dtype and device of `other`."""
    check_shape(name, tensor, tuple(other.shape), f"as {other_name} has")
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name} has dtype {_short(tensor.dtype)} and {other_name} {_short(other.dtype)}; make them equal")
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError where the two are on different devices."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} and {other_name} on {other.device}; move one of them")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
