"""The rope kernel, forward and backward, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.layers import angles, check_batch_invariance, check_far_rows, check_rope, check_rope_qkv, drawn, passes
from triton_kernels import rope, rope_qkv


@pytest.mark.parametrize(("tokens", "heads", "size"), [(0, 2, 8), (1, 1, 2), (17, 9, 64), (3, 40, 128), (4, 3, 80), (2, 5, 6)])
def test_against_float64(tokens: int, heads: int, size: int) -> None:
    check_rope(tokens, heads, size, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check_rope(5, 4, 64, dtype)


def test_heads_of_a_packed_projection_need_no_copy() -> None:
    """Queries as a view of the fused projection: the token stride covers queries, keys and values."""
    fused = drawn(7, 6, 16)
    cos, sin = angles(7, 16)
    actual = passes(lambda fused: rope(fused[:, 1:5], cos, sin), [fused])
    expected = passes(lambda fused: rope(fused[:, 1:5].contiguous(), cos, sin), [fused])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_tokens_beyond_2_31_elements(tmp_path: Path) -> None:
    check_far_rows(lambda x: rope(x, *angles(4, 8)), drawn(4, 2, 8, dtype=torch.bfloat16), tmp_path)


def test_a_token_has_the_same_bits_in_any_batch() -> None:
    check_batch_invariance(rope, [drawn(4, 3, 16), *angles(4, 16)])


@pytest.mark.parametrize(
    ("tokens", "groups", "queries", "size"), [(0, 1, 1, 8), (1, 2, 1, 2), (5, 3, 3, 64), (3, 1, 16, 128), (2, 8, 4, 128), (4, 2, 5, 6)]
)
def test_a_product_against_float64(tokens: int, groups: int, queries: int, size: int) -> None:
    check_rope_qkv(tokens, groups, queries, size, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_in_half_precision(dtype: torch.dtype) -> None:
    check_rope_qkv(5, 2, 4, 64, dtype)


def test_values_are_copied_bit_for_bit() -> None:
    """Also if a neighbouring element is infinite: a multiplication by 0 would give NaN."""
    qkv = drawn(3, 2, 4, 8)
    qkv[1, :, -1, 2] = float("inf")
    assert torch.equal(rope_qkv(qkv, *angles(3, 8))[2], qkv[:, :, -1])


def test_gradients_of_any_strides() -> None:
    """Heads-first gradients, as attention returns them."""
    cos, sin = angles(5, 8)
    three = [drawn(heads, 5, 8, seed=heads).transpose(0, 1) for heads in (6, 2, 2)]
    actual, expected = (torch.ops.trivet.rope_qkv_backward(*grads, cos, sin) for grads in (three, [x.contiguous() for x in three]))
    assert torch.equal(actual, expected)


def test_products_beyond_2_31_elements(tmp_path: Path) -> None:
    check_far_rows(lambda qkv: rope_qkv(qkv, *angles(4, 8)), drawn(4, 1, 4, 8, dtype=torch.bfloat16), tmp_path)
