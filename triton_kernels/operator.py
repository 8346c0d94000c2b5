"""Kernels as torch operators, which work with torch.compile, meta tensors and dispatch modes, with little host overhead.

torch.library.custom_op does the same, but its checks take longer on the host than a small kernel on the GPU. Here a call uses torch's
dispatcher only if a tracer or a dispatch mode must see it. Otherwise the function is called directly, inside an autograd.Function if a
gradient is needed.
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
    """`function` as torch.ops.trivet.NAME, for CPU and GPU tensors. It runs below autograd.

    `mutates` names the arguments that it writes to. See torch.library.infer_schema for the supported argument types.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates: Sequence[str]):
        self.name, self.function = name, function
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        for backend in ("CPU", "CUDA"):
            LIBRARY.impl(name, function, backend)
        LIBRARY.impl(name, self._above_autograd, "Autograd")
        self.overload = getattr(torch.ops.trivet, name).default
        self.differentiable = self._differentiable(self._no_derivative, lambda *_: None)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Decorator: `fake` returns empty tensors of the shapes that the function returns."""
        torch.library.register_fake(f"trivet::{self.name}", fake, lib=LIBRARY)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[[Any, tuple[Any, ...], Any], None]) -> None:
        """Make it differentiable. `setup_context(ctx, inputs, output)` saves what `backward(ctx, *grads)` needs."""
        self.differentiable = self._differentiable(backward, setup_context)

    def __call__(self, *inputs: Any) -> Any:
        if not _is_plain(inputs):
            return self.overload(*inputs)
        return self.differentiable(*inputs) if _needs_gradient(inputs) else self.function(*inputs)

    def _differentiable(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> Callable[..., Any]:
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = self._compute(inputs)
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(f"trivet_{self.name}", (torch.autograd.Function,), methods).apply

    def _no_derivative(self, *_: Any) -> None:
        raise RuntimeError(f"trivet::{self.name} has no derivative; detach its inputs, or differentiate once (create_graph=False)")

    def _above_autograd(self, *inputs: Any) -> Any:
        return self.differentiable(*inputs) if _needs_gradient(inputs) else self._compute(inputs)

    def _compute(self, inputs: tuple[Any, ...]) -> Any:
        """The outputs, detached from autograd."""
        if _is_plain(inputs):
            return self.function(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*inputs)


def operator(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator that turns a function into an Operator."""
    return lambda function: Operator(name, function, mutates)


def _needs_gradient(inputs: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs if isinstance(tensor, Tensor))


def _is_plain(inputs: tuple[Any, ...]) -> bool:
    """Whether all tensors have storage, and no tracer or dispatch mode must see the call."""
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack():
        return False
    return all(type(tensor) in PLAIN and not tensor.is_meta for tensor in inputs if isinstance(tensor, Tensor))
