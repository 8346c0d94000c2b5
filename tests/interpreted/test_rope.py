"""The rope kernel, forward and backward, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.layers import angles, check_a_row_does_not_know_its_batch, check_far_rows, check_rope, drawn, passes
from triton_kernels import rope


@pytest.mark.parametrize(("tokens", "heads", "size"), [(0, 2, 8), (1, 1, 2), (17, 9, 64), (3, 40, 128), (4, 3, 80), (2, 5, 6)])
def test_against_float64(tokens: int, heads: int, size: int) -> None:
    check_rope(tokens, heads, size, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check_rope(5, 4, 64, dtype)


def test_heads_of_a_packed_projection_need_no_copy() -> None:
    """Queries as they lie in the fused projection: a token's stride is that of queries, keys and values together."""
    fused = drawn(7, 6, 16)
    cos, sin = angles(7, 16)
    got = passes(lambda fused: rope(fused[:, 1:5], cos, sin), [fused])
    expected = passes(lambda fused: rope(fused[:, 1:5].contiguous(), cos, sin), [fused])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_tokens_beyond_2_31_elements(tmp_path: Path) -> None:
    check_far_rows(lambda x: rope(x, *angles(4, 8)), drawn(4, 2, 8, dtype=torch.bfloat16), tmp_path)


def test_a_token_has_the_same_bits_in_any_batch() -> None:
    check_a_row_does_not_know_its_batch(rope, [drawn(4, 3, 16), *angles(4, 16)])
