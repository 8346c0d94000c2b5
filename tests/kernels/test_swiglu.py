"""swiglu on CPU: its torch reference against float64, as an operator, under torch.compile, and its errors for invalid input."""

from __future__ import annotations

import pytest
import torch

from tests.support.layers import check_swiglu, drawn, passes
from triton_kernels import swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 1), (17, 7), (60, 1000)])
def test_against_float64(tokens: int, width: int, dtype: torch.dtype) -> None:
    check_swiglu(tokens, width, dtype)


def test_gates_far_from_zero() -> None:
    value, grad = passes(swiglu, [torch.tensor([[1000.0, -1000.0, 0.0, 2.0, 2.0, 2.0]])])
    assert value.tolist() == [[2000.0, 0.0, 0.0]]
    assert grad.isfinite().all()


def test_operator() -> None:
    torch.library.opcheck(torch.ops.trivet.swiglu.default, (drawn(3, 10).requires_grad_(),))
    torch.library.opcheck(torch.ops.trivet.swiglu.default, (drawn(10, 3).T.requires_grad_(),))
    torch.library.opcheck(torch.ops.trivet.swiglu_backward.default, (drawn(3, 5), drawn(3, 10)))


def test_compiles_in_one_graph() -> None:
    def layer(x: torch.Tensor) -> torch.Tensor:
        return swiglu(x + 1) * 2

    compiled = passes(torch.compile(layer, fullgraph=True, backend="aot_eager"), [drawn(5, 12)])
    assert all(torch.equal(a, b) for a, b in zip(compiled, passes(layer, [drawn(5, 12)]), strict=True))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="gate_up has dtype int64; use bfloat16, float16 or float32"):
        swiglu(torch.zeros(2, 4, dtype=torch.int64))
    for shape in ((2, 5), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"gate_up has shape \[.*\]; use \[tokens, 2 \* width\]"):
            swiglu(torch.zeros(shape))
