"""The rope kernel, forward and backward, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.layers import angles, check_rope, drawn, passes
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
    """Token 3 begins 3 * 2^30 elements in: its offset does not fit 32 bits. The file is sparse; only the tokens take room."""
    stored = torch.from_file(str(tmp_path / "tokens"), shared=True, size=3 * 2**30 + 16, dtype=torch.bfloat16)
    far = stored.as_strided((4, 2, 8), (2**30, 8, 1))
    near = drawn(4, 2, 8, dtype=torch.bfloat16)
    far.copy_(near)
    assert torch.equal(rope(far, *angles(4, 8)), rope(near, *angles(4, 8)))
