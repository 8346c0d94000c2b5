"""The kernels of ppo_loss against float64."""

from __future__ import annotations

import pytest
import torch

from tests import check_ppo


@pytest.mark.parametrize(("tokens", "kl"), [(1, "k3"), (17, "k1"), (1024, "k2"), (2500, "k3")])
def test_against_float64(tokens: int, kl: str) -> None:
    check_ppo.check_against_float64(tokens, kl)


def test_bf16() -> None:
    check_ppo.check_against_float64(300, "k3", torch.bfloat16)


def test_more_blocks_than_the_last_one_reads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_kernels.ppo.BLOCK", 16)
    monkeypatch.setattr("triton_kernels.ppo.READ", 8)
    check_ppo.check_against_float64(300, "k3")


def test_tokens_without_weight_are_not_computed_with() -> None:
    check_ppo.check_tokens_without_weight_are_not_computed_with()


def test_both_clips() -> None:
    check_ppo.check_both_clips()


def test_small_divergences_keep_their_digits() -> None:
    check_ppo.check_small_divergences_keep_their_digits()


def test_far_ratios() -> None:
    check_ppo.check_far_ratios()


def test_value_alone() -> None:
    check_ppo.check_value_alone()


def test_runs_repeat() -> None:
    check_ppo.check_runs_repeat()


def test_nothing_at_all() -> None:
    check_ppo.check_nothing_at_all()
