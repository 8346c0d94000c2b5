"""The rmsnorm kernels, forward and backward, against float64."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.support.layers import EPS, check_far_rows, check_rmsnorm, drawn, passes
from triton_kernels import rmsnorm


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (17, 7), (3, 576), (2, 1000), (2, 4104), (1, 16033)])
def test_against_float64(rows: int, width: int, fused: bool) -> None:
    check_rmsnorm(rows, width, torch.float32, fused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check_rmsnorm(5, 200, dtype, fused=True)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(0, 65536), (3, 16384), (1, 65536)])
def test_rows_wider_than_the_registers(rows: int, width: int, fused: bool) -> None:
    check_rmsnorm(rows, width, torch.float32, fused)


def test_wide_rows_of_any_width_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 columns with a partial last tile; more rows than programs; bfloat16."""
    file = import_module("triton_kernels.rmsnorm")  # the package attribute of this name is the function, not the module
    monkeypatch.setattr(file, "WIDEST", 128)
    monkeypatch.setattr(file, "TILE", 64)
    monkeypatch.setattr(file, "PARTS", 4)
    check_rmsnorm(9, 70, torch.float32, fused=True)
    check_rmsnorm(3, 1000, torch.float32, fused=False)
    check_rmsnorm(3, 200, torch.bfloat16, fused=True)


def test_more_rows_than_programs() -> None:
    """300 rows over 150 programs: each sums two rows of the weight's gradient; with 257 rows the last program has one."""
    check_rmsnorm(300, 8, torch.float32, fused=False)
    check_rmsnorm(257, 8, torch.float32, fused=False)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    x, weight = drawn(5, 96), drawn(96, seed=1)
    full = rmsnorm(x, weight, EPS)
    for row in range(5):
        assert torch.equal(rmsnorm(x[row], weight, EPS), full[row])


def test_two_runs_have_the_same_bits() -> None:
    inputs = [drawn(40, 33), drawn(33, seed=1), drawn(40, 33, seed=2)]
    first, second = (passes(lambda x, weight, residual: rmsnorm(x, weight, EPS, residual), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_of_a_wider_tensor_need_no_copy() -> None:
    wide, weight = drawn(6, 50), drawn(31, seed=1)
    actual = passes(lambda wide, weight: rmsnorm(wide[:, 3:34], weight, EPS), [wide, weight])
    expected = passes(lambda wide, weight: rmsnorm(wide[:, 3:34].contiguous(), weight, EPS), [wide, weight])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_rows_beyond_2_31_elements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_far_rows(lambda x: rmsnorm(x, drawn(8, seed=1), EPS, x), drawn(4, 8, dtype=torch.bfloat16), tmp_path)
    monkeypatch.setattr(import_module("triton_kernels.rmsnorm"), "WIDEST", 8)
    check_far_rows(lambda x: rmsnorm(x, drawn(8, seed=1), EPS, x), drawn(4, 8, dtype=torch.bfloat16), tmp_path)
