"""decode_attention on CPU: its torch reference against float64, and its errors for invalid input."""

from __future__ import annotations

import pytest
import torch

from tests.support.check_decode_attention import check, problem
from triton_kernels import decode_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "group", "size"), [(1, 1, 2), (2, 4, 64), (1, 3, 80)])
def test_against_float64(heads: int, group: int, size: int, dtype: torch.dtype) -> None:
    check([1, 70, 0, 256, 257], heads, group, size, 300, dtype=dtype, spare=2, beyond=9.0)
    check([], heads, group, size, 3, dtype=dtype, spare=1)
    check([0, 0], heads, group, size, 3, dtype=dtype)


def test_bad_input_is_named() -> None:
    query, keys, values, lengths = problem([3, 2], 2, 2, 8, 4)
    with pytest.raises(ValueError, match=r"query has shape \[2, 3, 8\] and keys \[2, 2, 4, 8\]; use"):
        decode_attention(query[:, :3], keys, values, lengths)
    with pytest.raises(ValueError, match="at least n slots"):
        decode_attention(query, keys[:1], values[:1], lengths)
    with pytest.raises(ValueError, match=r"query is torch\.float16 with head size 8, keys torch\.float32 with head size 8; make"):
        decode_attention(query.half(), keys, values, lengths)
    with pytest.raises(ValueError, match=r"values has shape \[2, 2, 3, 8\] where \[2, 2, 4, 8\] is needed, as keys has"):
        decode_attention(query, keys, values[:, :, :3], lengths)
    with pytest.raises(ValueError, match=r"lengths has shape \[1\] where \[2\] is needed, one for each row"):
        decode_attention(query, keys, values, lengths[:1])
    with pytest.raises(ValueError, match=r"lengths are torch\.float32; use torch\.int32 or torch\.int64"):
        decode_attention(query, keys, values, lengths.float())
