"""Kernels are launched on the GPU of their tensors; without Triton they are never launched."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.support.paths import ROOT
from triton_kernels.launch import launch

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as where it is not installed: to import it is an error
import torch
from triton_kernels import dpo_norm, linear_logprob, rmsnorm
hidden, weight = torch.ones(3, 8, requires_grad=True), torch.ones(10, 8, requires_grad=True)
logp, _, _ = linear_logprob(rmsnorm(hidden, torch.ones(8), 1e-5), weight, torch.tensor([1, 2, 3]))
loss, _ = dpo_norm(logp, torch.zeros(3), torch.ones(3, dtype=torch.bool), torch.tensor([0, 1, 3]), torch.tensor([[0, 1]]), 5.0)
loss.sum().backward()
print(round(float(logp.exp().sum()), 4), weight.grad.shape)
"""


def test_references_need_no_triton() -> None:
    root = ROOT
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=root, capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "0.3 torch.Size([10, 8])", done.stderr


class Recorded:
    """A kernel that records its launches."""

    def __init__(self, events: list[Any]):
        self.events = events

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.events.append((grid, arguments, constants))


class OnSecondGpu(torch.Tensor):
    """A tensor that reports a second GPU as its device."""

    def get_device(self) -> int:
        return 1


@pytest.mark.parametrize(("current", "entered"), [(0, [1]), (1, [])])
def test_a_kernel_runs_on_the_device_of_its_first_tensor(monkeypatch: pytest.MonkeyPatch, current: int, entered: list[int]) -> None:
    """Whichever device is current, because a process may use several GPUs. Entering the current device again would only cost time."""
    events: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda index: (events.append(index), nullcontext())[1])
    absent, tensor, other = None, torch.zeros(2).as_subclass(OnSecondGpu), torch.zeros(3)
    launch(Recorded(events), (2, 1), absent, tensor, other, 7, BLOCK=4)
    assert events == [*entered, ((2, 1), (absent, tensor, other, 7), {"BLOCK": 4})]


def test_a_kernel_on_the_host_sets_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked for a GPU"))
    launch(Recorded(events), (1,), tensor := torch.zeros(2))
    assert events == [((1,), (tensor,), {})]


def test_an_empty_grid_is_not_launched() -> None:
    events: list[Any] = []
    launch(Recorded(events), (0, 3), torch.zeros(0))
    assert not events
