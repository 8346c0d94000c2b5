"""The proof that decoding in CUDA graphs is given before it is relied on, with a stand-in for what captures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.megatron.graphs import Graphs, Setting, _alike

HIDDEN = torch.arange(12, dtype=torch.float32).view(3, 4)
DRAWN = torch.tensor([[5.0, 900.0], [-1.5, -0.25]], dtype=torch.float64)


def graphs(
    monkeypatch: pytest.MonkeyPatch, captured: Callable[[Callable[[], Tensor]], Callable[[], Tensor]], on_gpu: bool = True
) -> Graphs:
    world: Any = SimpleNamespace(on_gpu=on_gpu)
    alone: Any = SimpleNamespace(size=lambda: 1)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(Graphs, "_captured", lambda self, compute: captured(compute))
    return Graphs(world, alone)


def replayed(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: compute().clone()


def failing(_: Callable[[], Tensor]) -> Callable[[], Tensor]:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def wrong(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: compute() + 1


def test_the_first_graph_is_proven_and_the_others_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = 0

    def compute() -> Tensor:
        nonlocal runs
        runs += 1
        return HIDDEN

    own = graphs(monkeypatch, replayed)
    assert own.asked("auto") is own
    assert torch.equal(own.capture(compute)(), HIDDEN)
    assert runs == 3  # launched, replayed to be compared, replayed
    own.capture(compute)
    assert runs == 3
    assert own.proven
    assert own.asked("auto") is own


@pytest.mark.parametrize(("captured", "why"), [
    (failing, "capture failed: operation not permitted when stream is capturing;"),
    (wrong, "a captured wave computes other numbers than its launches one by one;"),
])  # fmt: skip
def test_what_is_not_proven_is_launched_one_by_one(monkeypatch: pytest.MonkeyPatch, captured: Any, why: str) -> None:
    """With one line why, once; where graphs are insisted on, it is the end."""
    own = graphs(monkeypatch, captured)
    assert own.asked("auto") is own
    with pytest.warns(UserWarning, match=f"rollout.graphs: {why} decoding goes on without CUDA graphs") as said:
        launched = own.capture(lambda: HIDDEN)
    assert len(said) == 1
    assert torch.equal(launched(), HIDDEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(own.capture(lambda: HIDDEN)(), HIDDEN)
    assert own.asked("auto") is None
    assert own.asked("on") is own
    with pytest.raises(RuntimeError, match=f"rollout.graphs=on: {why} use rollout.graphs=off"):
        own.capture(lambda: HIDDEN)


@pytest.mark.parametrize(("setting", "on_gpu", "taken"), [
    ("auto", True, True), ("auto", False, False), ("on", False, True), ("on", True, True), ("off", True, False),
])  # fmt: skip
def test_who_decodes_in_graphs(monkeypatch: pytest.MonkeyPatch, setting: Setting, on_gpu: bool, taken: bool) -> None:
    own = graphs(monkeypatch, replayed, on_gpu)
    assert (own.asked(setting) is own) == taken
    if not on_gpu:  # there is nothing to capture with
        assert own.capture(HIDDEN.clone)().equal(HIDDEN)
        assert not own.proven


def test_tokens_must_be_the_same_and_the_rest_nearly() -> None:
    assert _alike(HIDDEN * (1 + 2**-8), HIDDEN)
    assert not _alike(HIDDEN * (1 + 2**-5), HIDDEN)
    assert not _alike(torch.where(HIDDEN == 3, torch.nan, HIDDEN), HIDDEN)
    other = DRAWN.clone()
    other[1, 0] += 1e-3
    assert _alike(other, DRAWN)
    other[0, 1] += 1
    assert not _alike(other, DRAWN)


def test_ranks_agree_on_any_rank_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose own graph is good does as the one whose is not."""
    own = graphs(monkeypatch, replayed)
    own.group = SimpleNamespace(size=lambda: 2)  # type: ignore[assignment]
    reasons = iter([["", ""], ["", "a captured wave computes other numbers than its launches one by one"]])
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda into, _, group: into.__setitem__(slice(None), next(reasons)))
    own.asked("auto")
    with pytest.warns(UserWarning, match="other numbers"):
        own.capture(lambda: HIDDEN)
    assert own.refused
