"""deterministic=true: the switches that it sets, and that no operation of the engine lacks a deterministic implementation."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.commands.recipe import load_recipe
from engine.config import Model, Parallel
from engine.config.overrides import override
from engine.distributed.world import CUBLAS, deterministic
from tests.support import jobs_token_loss
from tests.support.jobs import TINY
from tests.support.pool import ranks

memory: Any = torch.utils.deterministic


def test_all_switches_are_set_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not memory.fill_uninitialized_memory
        assert os.environ[CUBLAS] == ":16:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert memory.fill_uninitialized_memory


def test_nothing_is_set_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    assert CUBLAS not in os.environ


def test_another_workspace_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS, ":4096:2")
    with (
        pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG=:4096:2 is not deterministic; unset it, or use :16:8 or :4096:8"),
        deterministic(True),
    ):
        pass
    monkeypatch.setenv(CUBLAS, ":4096:8")
    with deterministic(True):
        assert os.environ[CUBLAS] == ":4096:8"


@pytest.mark.parametrize(("size", "parallel"), [(1, Parallel()), (2, Parallel(tp=2))], ids=str)
def test_deterministic_steps_have_the_same_results(size: int, parallel: Parallel) -> None:
    """For the losses of SFT and PPO on CPU: every operation has a deterministic implementation with the same result."""
    plain, repeatable = (
        ranks(size).run(jobs_token_loss.repeated, parallel=parallel, model=Model(init=replace(TINY, tied=True)), on=on)
        for on in (False, True)
    )
    assert plain == repeatable


def test_resume_may_change_deterministic() -> None:
    run = load_recipe("recipes/tiny_sft.py")
    changed = override(run, ["deterministic=true"])
    assert changed.deterministic
    assert run.identity() == changed.identity()
