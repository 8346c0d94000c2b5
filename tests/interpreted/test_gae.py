"""The kernel of gae against float64."""

from __future__ import annotations

import pytest
import torch

from tests import check_gae


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_against_float64(gamma: float, lam: float) -> None:
    check_gae.check_against_float64(gamma, lam)


def test_bf16() -> None:
    check_gae.check_against_float64(1.0, 0.95, torch.bfloat16)


def test_sparse_reward() -> None:
    check_gae.check_sparse_reward()


def test_a_long_gap() -> None:
    check_gae.check_a_long_gap()


def test_a_sequence_does_not_know_its_batch() -> None:
    check_gae.check_a_sequence_does_not_know_its_batch()


def test_nothing_at_all() -> None:
    check_gae.check_nothing_at_all()
