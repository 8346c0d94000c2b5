"""Checks of dtypes, shapes and devices, with one-line errors. They never read values, so they never synchronize with a device."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_float(**tensors: Tensor) -> None:
    """Raises ValueError for a tensor whose dtype the kernels do not support."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} has dtype {_short(tensor.dtype)}; use bfloat16, float16 or float32")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Raises ValueError unless `tensor` has shape `shape`; `why` is appended to the message, such as "as wide as x"."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)} where {list(shape)} is needed, {why}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises ValueError unless `tensor` has the shape, dtype and device of `other`."""
    check_shape(name, tensor, tuple(other.shape), f"as {other_name} has")
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name} has dtype {_short(tensor.dtype)} and {other_name} {_short(other.dtype)}; make them equal")
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises ValueError if the two are on different devices."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} and {other_name} on {other.device}; move one of them")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
