"""A loss takes one launch forward, and one backward unless its gradient is computed in forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from tests.support import check_gae, check_ppo
from tests.support.float64 import normal, packed
from triton_kernels import dpo_norm, gae, ppo_loss, seq_logps, value_loss


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the launched kernels."""
    names: list[str] = []
    for kind in (InterpretedFunction, JITFunction):  # the latter on a GPU
        monkeypatch.setattr(kind, "run", _noting(names, kind.run))
    return names


def _noting(names: list[str], started: Any) -> Any:
    def run(kernel: Any, *arguments: Any, **constants: Any) -> Any:
        names.append(kernel.fn.__name__)
        return started(kernel, *arguments, **constants)

    return run


def test_ppo(launched: list[str]) -> None:
    """Gradients and all statistics of several blocks, and of no tokens, in one launch; backward only scales."""
    for tokens in (2500, 0):
        inputs = check_ppo.problem(tokens)
        ppo_loss(**inputs | {"logp": inputs["logp"].requires_grad_()}, **check_ppo.SETTINGS)[0].backward()
        assert len(launched) == 1
        launched.clear()


def test_value(launched: list[str]) -> None:
    inputs = check_ppo.value_problem(2500)
    value_loss(inputs["value"].requires_grad_(), inputs["old_value"], inputs["returns"], inputs["weight"]).backward()
    assert len(launched) == 1


def test_gae(launched: list[str]) -> None:
    gae(*check_gae.problem([30, 0, 700]), 1.0, 0.95)
    assert len(launched) == 1


def test_dpo(launched: list[str]) -> None:
    cu_seqlens, mask = packed([40, 0, 1300, 7])
    logp = normal(len(mask), 1).requires_grad_()
    pairs = torch.tensor([[0, 2], [3, 1]])
    for loss in (dpo_norm(logp, logp.detach(), mask, cu_seqlens, pairs, 5.0)[0], seq_logps(logp, mask, cu_seqlens)[0]):
        loss.sum().backward()
    forward, sums, backward, sums_backward = launched
    assert forward != backward
    assert sums != sums_backward
