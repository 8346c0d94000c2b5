"""The kernels of dpo_norm and seq_logps, with the checks of tests/support."""

from __future__ import annotations

from tests.support.check_dpo import (  # noqa: F401 (collected here as tests)
    test_against_float64,
    test_batch_invariance,
    test_bf16,
    test_empty_input,
    test_far_margins,
    test_masked_tokens_are_not_read,
    test_seq_logps,
)
