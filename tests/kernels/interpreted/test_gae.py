"""The kernels of gae, with the checks of tests/support."""

from __future__ import annotations

from tests.support.check_gae import (  # noqa: F401 (collected here as tests)
    test_a_long_gap,
    test_a_sequence_does_not_know_its_batch,
    test_against_float64,
    test_bf16,
    test_nothing_at_all,
    test_sparse_reward,
)
