"""Runs tests written for CPU on another device: new tensors are created there, with the random numbers of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _DrawnOnHost(TorchFunctionMode):
    """Random numbers from a host generator are generated on the host, then moved."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        generator = (kwargs or {}).get("generator")
        if generator is None or generator.device.type != "cpu":
            return func(*args, **(kwargs or {}))
        return func(*args, **kwargs, device="cpu").to(self.device)


@contextmanager
def everything_on(device: torch.device) -> Iterator[None]:
    """New tensors are on `device` unless another is given."""
    with device, _DrawnOnHost(device):
        yield
