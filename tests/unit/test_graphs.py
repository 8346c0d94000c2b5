"""The check that replayed CUDA graphs equal launched kernels before decoding uses them, with a fake capture."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config.choices import CudaGraphs
from engine.megatron.graphs import Graphs, _equal

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


def test_only_the_first_graph_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = 0

    def compute() -> Tensor:
        nonlocal runs
        runs += 1
        return HIDDEN

    own = graphs(monkeypatch, replayed)
    assert own.enabled("auto") is own
    assert torch.equal(own.capture(compute)(), HIDDEN)
    assert runs == 3  # launched, replayed for comparison, replayed
    own.capture(compute)
    assert runs == 3
    assert own.checked
    assert own.enabled("auto") is own


@pytest.mark.parametrize(("captured", "why"), [
    (failing, "capture failed: operation not permitted when stream is capturing;"),
    (wrong, "the captured graph's results differ from eager execution;"),
])  # fmt: skip
def test_without_a_passed_check_kernels_are_launched(monkeypatch: pytest.MonkeyPatch, captured: Any, why: str) -> None:
    """With one warning that gives the reason. If cuda_graphs=on, it is an error."""
    own = graphs(monkeypatch, captured)
    assert own.enabled("auto") is own
    with pytest.warns(UserWarning, match=f"rollout.cuda_graphs=auto: {why} decoding without CUDA graphs") as message:
        launched = own.capture(lambda: HIDDEN)
    assert len(message) == 1
    assert torch.equal(launched(), HIDDEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(own.capture(lambda: HIDDEN)(), HIDDEN)
    assert own.enabled("auto") is None
    assert own.enabled("on") is own
    with pytest.raises(RuntimeError, match=f"rollout.cuda_graphs=on: {why} use rollout.cuda_graphs=off"):
        own.capture(lambda: HIDDEN)


@pytest.mark.parametrize(("setting", "on_gpu", "taken"), [
    ("auto", True, True), ("auto", False, False), ("on", False, True), ("on", True, True), ("off", True, False),
])  # fmt: skip
def test_when_graphs_are_used(monkeypatch: pytest.MonkeyPatch, setting: CudaGraphs, on_gpu: bool, taken: bool) -> None:
    own = graphs(monkeypatch, replayed, on_gpu)
    assert (own.enabled(setting) is own) == taken
    if not on_gpu:  # capture needs a GPU
        assert own.capture(HIDDEN.clone)().equal(HIDDEN)
        assert not own.checked


def test_tokens_must_be_equal_and_floats_close() -> None:
    assert _equal(HIDDEN * (1 + 2**-8), HIDDEN)
    assert not _equal(HIDDEN * (1 + 2**-5), HIDDEN)
    padded = torch.where(HIDDEN == 3, torch.nan, HIDDEN)
    assert not _equal(padded, HIDDEN)
    assert not _equal(HIDDEN, padded)
    assert _equal(padded, padded.clone())
    other = DRAWN.clone()
    other[1, 0] += 1e-3
    assert _equal(other, DRAWN)
    other[0, 1] += 1
    assert not _equal(other, DRAWN)


def test_all_ranks_follow_a_failed_check_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose own check passed does not use graphs either."""
    own = graphs(monkeypatch, replayed)
    own.group = SimpleNamespace(size=lambda: 2)  # type: ignore[assignment]
    reasons = iter([["", ""], ["", "the captured graph's results differ from eager execution"]])
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda into, _, group: into.__setitem__(slice(None), next(reasons)))
    own.enabled("auto")
    with pytest.warns(UserWarning, match="results differ"):
        own.capture(lambda: HIDDEN)
    assert own.failed
