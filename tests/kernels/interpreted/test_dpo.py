"""The kernels of dpo_norm and seq_logps, with the checks of tests/support."""

from __future__ import annotations

from tests.support.check_dpo import (  # noqa: F401 (collected here as tests)
    test_a_pair_does_not_know_its_batch,
    test_against_float64,
    test_bf16,
    test_far_margins,
    test_masked_tokens_are_not_read,
    test_nothing_at_all,
    test_seq_logps,
)
