"""The kernels of gae, with the checks of tests/support."""

from __future__ import annotations

from tests.support.check_gae import (  # noqa: F401 (collected here as tests)
    test_a_long_gap,
    test_against_float64,
    test_batch_invariance,
    test_bf16,
    test_empty_input,
    test_sparse_reward,
)
