"""The kernels of ppo_loss and value_loss, with the checks of tests/support."""

from __future__ import annotations

import pytest

from tests.support import check_ppo
from tests.support.check_ppo import (  # noqa: F401 (collected here as tests)
    test_against_float64,
    test_bf16,
    test_both_clips,
    test_far_ratios,
    test_nothing_at_all,
    test_runs_repeat,
    test_small_divergences_keep_their_digits,
    test_tokens_without_weight_are_not_computed_with,
    test_value_against_float64,
    test_values_without_weight_are_not_computed_with,
)


def test_more_blocks_than_the_last_one_reads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_kernels.ppo.BLOCK", 16)
    monkeypatch.setattr("triton_kernels.ppo.READ", 8)
    check_ppo.check_against_float64(300, "k3")
