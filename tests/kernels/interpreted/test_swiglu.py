"""The swiglu kernels, forward and backward, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.layers import check_batch_invariance, check_far_rows, check_swiglu, drawn, passes
from triton_kernels import swiglu


@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 1), (17, 7), (3, 1000), (2, 4104), (1, 16033)])
def test_against_float64(tokens: int, width: int) -> None:
    check_swiglu(tokens, width, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check_swiglu(3, 200, dtype)


def test_gates_far_from_zero() -> None:
    """exp(1000) is infinite; silu(1000) is 1000 and silu(-1000) is 0, with derivatives 1 and 0."""
    value, grad = passes(swiglu, [torch.tensor([[1000.0, -1000.0, 0.0, 2.0, 2.0, 2.0]])])
    assert value.tolist() == [[2000.0, 0.0, 0.0]]
    assert grad.isfinite().all()


def test_rows_of_a_wider_tensor_need_no_copy() -> None:
    wide = drawn(6, 50)
    actual = passes(lambda wide: swiglu(wide[:, 3:33]), [wide])
    expected = passes(lambda wide: swiglu(wide[:, 3:33].contiguous()), [wide])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_rows_beyond_2_31_elements(tmp_path: Path) -> None:
    check_far_rows(swiglu, drawn(4, 8, dtype=torch.bfloat16), tmp_path)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    check_batch_invariance(swiglu, [drawn(4, 2 * 33)])
