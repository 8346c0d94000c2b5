"""The kernels of decode_attention against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.check_decode_attention import check, check_batch_invariance, problem
from triton_kernels import decode_attention

SHAPES = [(1, 1, 2), (2, 4, 64), (1, 3, 80), (1, 16, 128), (1, 5, 96), (3, 17, 8)]


@pytest.mark.parametrize(("heads", "group", "size"), SHAPES)
def test_against_float64(heads: int, group: int, size: int) -> None:
    check([1, 70, 0, 256, 257, 600], heads, group, size, 600)


def test_many_spans_are_merged_in_order() -> None:
    check([2400, 2049, 7], 1, 2, 16, 2500, spare=2)


def test_no_rows() -> None:
    check([], 2, 2, 16, 10, spare=3)
    check([0, 0], 2, 2, 16, 10)


def test_half_precision() -> None:
    check([300, 17], 2, 4, 64, 300, dtype=torch.float16)


def test_scores_of_any_size() -> None:
    """Scores are relative to the maximum, so nothing overflows: if one of two scores is much larger, the output is its value."""
    query, keys, values, lengths = problem([300], 1, 1, 16, 300)
    keys[0, 0, 7] = query[0, 0] * 1e4
    torch.testing.assert_close(decode_attention(query, keys, values, lengths)[0, 0], values[0, 0, 7])


def test_batch_invariance() -> None:
    check_batch_invariance()


def test_slots_beyond_2_31_elements(tmp_path: Path) -> None:
    """Slot 3 starts at element 3 * 2^30: its offset does not fit in 32 bits. The file is sparse."""
    query, keys, values, lengths = problem([5, 9, 3, 8], 2, 2, 16, 9, torch.float16)
    stored = torch.from_file(str(tmp_path / "slots"), shared=True, size=3 * 2**30 + keys[0].numel(), dtype=keys.dtype)
    far = stored.as_strided(keys.shape, (2**30, *keys.stride()[1:]))
    for kept in (keys, values):
        far.copy_(kept)
        assert torch.equal(decode_attention(query, far, far, lengths), decode_attention(query, kept, kept, lengths))
