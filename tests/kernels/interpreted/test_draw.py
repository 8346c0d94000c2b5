"""The sampling kernel against its definition."""

from __future__ import annotations

import pytest

from tests.support.check_draw import check


@pytest.mark.parametrize(("rows", "vocab", "valid"), [(1, 1, None), (5, 1000, None), (3, 4104, 4100), (2, 16033, 16001)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_highest_score_is_sampled(rows: int, vocab: int, valid: int | None, temperature: float) -> None:
    check(rows, vocab, temperature, valid)
