"""The kernels of ppo_loss and value_loss, with the checks of tests/support."""

from __future__ import annotations

import pytest

from tests.support import check_ppo
from tests.support.check_ppo import (  # noqa: F401 (collected here as tests)
    test_against_float64,
    test_bf16,
    test_both_clips,
    test_empty_input,
    test_far_ratios,
    test_runs_repeat,
    test_small_divergences_keep_their_digits,
    test_tokens_of_weight_0_are_not_read,
    test_value_against_float64,
    test_values_of_weight_0_are_not_read,
)


def test_more_blocks_than_the_last_block_reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_kernels.ppo.BLOCK", 16)
    monkeypatch.setattr("triton_kernels.ppo.READ", 8)
    check_ppo.check_against_float64(300, "k3")
