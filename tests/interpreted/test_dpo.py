"""The kernels of dpo_norm and seq_logps against float64."""

from __future__ import annotations

import pytest
import torch

from tests import check_dpo


@pytest.mark.parametrize(("normalize", "smoothing", "ref_is"), [(True, 0.0, "tokens"), (True, 0.1, "sums"), (False, 0.0, "sums")])
def test_against_float64(normalize: bool, smoothing: float, ref_is: str) -> None:
    check_dpo.check_against_float64(normalize, smoothing, ref_is)


def test_bf16() -> None:
    check_dpo.check_against_float64(True, 0.0, "tokens", torch.bfloat16)
    check_dpo.check_seq_logps(torch.bfloat16)


def test_far_margins() -> None:
    check_dpo.check_far_margins()


def test_masked_tokens_are_not_read() -> None:
    check_dpo.check_masked_tokens_are_not_read()


def test_a_pair_does_not_know_its_batch() -> None:
    check_dpo.check_a_pair_does_not_know_its_batch()


def test_nothing_at_all() -> None:
    check_dpo.check_nothing_at_all()


def test_seq_logps() -> None:
    check_dpo.check_seq_logps()
