"""The promises of ppo_loss and value_loss, kept by the kernels."""

from __future__ import annotations

import pytest

from tests.support import check_ppo
from tests.support.check_ppo import *  # noqa: F403


def test_more_blocks_than_the_last_one_reads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_kernels.ppo.BLOCK", 16)
    monkeypatch.setattr("triton_kernels.ppo.READ", 8)
    check_ppo.check_against_float64(300, "k3")
