"""Kernels as operators of torch: visible to torch.compile, meta tensors and dispatch modes, at a low price on the host.

torch.library.custom_op does the same with checks that cost the host more than a small kernel costs the GPU. Here a call goes through
torch's dispatcher only where a tracer or a mode is to see it. Elsewhere the function itself is called, inside an autograd.Function where
a gradient is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack  # modes: FakeTensorMode, FlopCounterMode, the tracers of torch.compile

LIBRARY = torch.library.Library("trivet", "FRAGMENT")
PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """`function` as torch.ops.trivet.NAME. It computes on tensors of CPUs and GPUs, under no autograd.

    The arguments that it writes to are named in `mutates`. See torch.library.infer_schema for the types that it may take.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates: Sequence[str]):
        self.name, self.function = name, function
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        for backend in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, backend)
        self.overload = getattr(torch.ops.trivet, name).default
        self.differentiable: Callable[..., Any] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Decorator: `fake` returns empty tensors of the shapes that the function returns."""
        torch.library.register_fake(f"trivet::{self.name}", fake, lib=LIBRARY)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[[Any, tuple[Any, ...], Any], None]) -> None:
        """Make it differentiable. `setup_context(ctx, inputs, output)` keeps what `backward(ctx, *grads)` needs."""

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = self._compute(inputs)
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(f"trivet_{self.name}", (torch.autograd.Function,), methods)
        self.differentiable = function.apply
        LIBRARY.impl(self.name, lambda *inputs: function.apply(*inputs) if _needs_gradient(inputs) else self._compute(inputs), "Autograd")

    def __call__(self, *inputs: Any) -> Any:
        if not _is_plain(inputs):
            return self.overload(*inputs)
        if not _needs_gradient(inputs):
            return self.function(*inputs)
        if self.differentiable is not None:
            return self.differentiable(*inputs)
        with torch.no_grad():
            return self.function(*inputs)

    def _compute(self, inputs: tuple[Any, ...]) -> Any:
        """The outputs, cut off from autograd."""
        if _is_plain(inputs):
            return self.function(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*inputs)


def operator(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: the function becomes an Operator."""
    return lambda function: Operator(name, function, mutates)


def _needs_gradient(inputs: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in inputs if isinstance(each, Tensor))


def _is_plain(inputs: tuple[Any, ...]) -> bool:
    """Whether these are tensors with memory, and no tracer and no mode is to see the call."""
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack():
        return False
    return all(type(each) in PLAIN and not each.is_meta for each in inputs if isinstance(each, Tensor))
