"""Kernels are called directly, or through torch's dispatcher if a tracer or a dispatch mode is active."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from triton_kernels import linear_logprob, logprob, rmsnorm, rope, swiglu
from triton_kernels.swiglu import _forward


class Listening(TorchDispatchMode):
    """Records the names of this project's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "trivet":
            self.names.append(function._opname)
        return function(*args, **kwargs or {})


class Subclass(Tensor):
    pass


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of swiglu through the dispatcher."""
    calls: list[Any] = []
    overload = _forward.overload
    monkeypatch.setattr(_forward, "overload", lambda *inputs: (calls.append(inputs), overload(*inputs))[1])
    return calls


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_plain_call_bypasses_the_dispatcher(dispatched: list[Any], requires_grad: bool) -> None:
    swiglu(torch.randn(3, 4, requires_grad=requires_grad))
    swiglu(torch.nn.Parameter(torch.randn(3, 4)))
    assert not dispatched


@pytest.mark.parametrize("x", [torch.randn(3, 4, device="meta"), torch.randn(3, 4).as_subclass(Subclass)], ids=["meta", "subclass"])
def test_other_tensors_are_dispatched(dispatched: list[Any], x: Tensor) -> None:
    swiglu(x)
    assert dispatched


def test_a_mode_sees_forward_and_backward() -> None:
    with Listening() as mode:
        swiglu(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert mode.names == ["swiglu", "swiglu_backward"]


def test_without_grad_mode_nothing_requires_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no autograd.Function is used."""
    monkeypatch.setattr(_forward, "differentiable", lambda *_: pytest.fail("asked for a gradient"))
    with torch.no_grad():
        assert not swiglu(torch.randn(3, 4, requires_grad=True)).requires_grad
    assert not torch.ops.trivet.swiglu(torch.randn(3, 4)).requires_grad


def angles(size: int) -> tuple[Tensor, Tensor]:
    return torch.ones(3, size), torch.zeros(3, size)


CALLS = {
    "swiglu": lambda x: swiglu(x),
    "rmsnorm": lambda x: rmsnorm(x, torch.ones(8), 1e-5),
    "logprob": lambda x: logprob(x, torch.tensor([1, 2, 3]))[0],
    "linear_logprob": lambda x: linear_logprob(x, torch.ones(10, 8), torch.tensor([1, 2, 3]))[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused(name: str) -> None:
    """No backward pass is differentiable, and a silent gradient of 0 would be wrong."""
    x = torch.randn(3, 8, requires_grad=True)
    (first,) = torch.autograd.grad(CALLS[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"trivet::{name}_backward has no derivative; detach its inputs"):
        first.sum().backward()


def test_the_second_derivative_of_a_linear_operation() -> None:
    """rope's backward is rope, and so differentiable."""
    x = torch.randn(3, 2, 8, requires_grad=True)
    (first,) = torch.autograd.grad(rope(x, *angles(4)).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, torch.full_like(x, 2.0))
