"""CUDA graphs for decoding. The first captured graph is compared with eager execution before any is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.config.choices import CudaGraphs
from engine.distributed.world import World


@contextmanager
def without_random_states() -> Iterator[None]:
    """Keep megatron from saving and setting random-number-generator states, which is not allowed during graph capture.

    Only for inference, which uses no random numbers: megatron sets the states anyway, around the embedding, the layers and recomputation.
    """
    from megatron.core.tensor_parallel import random

    with mock.patch.object(random.get_cuda_rng_tracker(), "fork", nullcontext), mock.patch.object(random, "_get_all_rng_states", tuple):
        yield


class Graphs:
    """Captures CUDA graphs into one memory pool. Graphs never run concurrently, so the pool is as large as the largest graph needs."""

    def __init__(self, world: World, group: ProcessGroup):
        """`group`: the ranks that capture and replay together."""
        self.world, self.group = world, group
        self.checked = self.failed = self.required = False
        self.pool: Any = None

    def enabled(self, setting: CudaGraphs) -> Graphs | None:
        """Returns itself for one generation, or None to decode eagerly.

        off   never
        auto  on GPUs. If the first graph fails or differs from eager execution, a warning says why and decoding stays eager from then on
        on    as auto, but `capture` raises RuntimeError instead of warning
        """
        if setting == "off" or (setting == "auto" and (self.failed or not self.world.on_gpu)):
            return None
        self.required, self.failed = setting == "on", False
        self.pool = torch.cuda.graph_pool_handle() if self.world.on_gpu else None
        return self

    def capture(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A function that replays `compute` as a CUDA graph; `compute` itself without a GPU.

        `compute` must have run before, use tensors with fixed addresses, be idempotent, and not synchronize with the device.
        """
        if not self.world.on_gpu or self.failed:
            return compute
        return self._captured(compute) if self.checked else self._first(compute)

    def _first(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture and compare with eager execution. All ranks of the group reach the same decision, because a graph contains their
        collectives."""
        expected, failure, graph = compute().clone(), "", compute
        try:
            graph = self._captured(compute)
        except RuntimeError as error:
            failure = f"capture failed: {str(error).splitlines()[0]}"
        problem = self._first_problem(failure)
        if not problem:
            problem = self._first_problem("" if _equal(graph(), expected) else "the captured graph's results differ from eager execution")
        if problem and self.required:
            raise RuntimeError(f"rollout.cuda_graphs=on: {problem}; use rollout.cuda_graphs=off")
        if problem:
            warnings.warn(f"rollout.cuda_graphs=auto: {problem}; decoding without CUDA graphs", stacklevel=2)
        self.checked, self.failed = not problem, bool(problem)
        return compute if problem else graph

    def _first_problem(self, own: str) -> str:
        """The first problem that any rank has, on every rank; "" for none."""
        if self.group.size() == 1:
            return own
        problems: list[Any] = [None] * self.group.size()
        dist.all_gather_object(problems, own, group=self.group)
        return next(filter(None, problems), "")

    def _captured(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        from megatron.core.parallel_state import get_global_memory_buffer

        graph = torch.cuda.CUDAGraph()
        # thread_local: device calls of other threads, such as NCCL's, neither enter the graph nor invalidate it.
        with without_random_states(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = compute()
        # megatron replaces its gather buffers when it needs larger ones; the graph keeps the captured ones alive.
        return _Captured(graph, out, list(get_global_memory_buffer().buffer.values()))


def _equal(actual: Tensor, expected: Tensor) -> bool:
    """Whether token ids are equal, and log-probs or hidden states are equal within bf16 rounding. NaN equals NaN: padding rows may hold
    it."""
    if actual.dtype == torch.float64 and not torch.isclose(actual[0], expected[0], rtol=0, atol=0, equal_nan=True).all():
        return False
    largest = float(expected.abs().nan_to_num().max())
    return bool(torch.isclose(actual, expected, rtol=0, atol=2**-6 * largest, equal_nan=True).all())


@dataclass(frozen=True)
class _Captured:
    graph: Any
    out: Tensor
    buffers: list[Tensor]  # kept alive: the graph reads and writes them

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.out.clone()  # the next replay of any graph may overwrite it
