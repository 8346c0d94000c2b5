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
    """For a forward that learns nothing, and so draws nothing at random: megatron sets the states of generators all the same, around the
    embedding, the layers and what is recomputed, and a GPU's must not be touched while a graph is captured."""
    from megatron.core.tensor_parallel import random

    with mock.patch.object(random.get_cuda_rng_tracker(), "fork", nullcontext), mock.patch.object(random, "_get_all_rng_states", tuple):
        yield


class Graphs:
    """Captures CUDA graphs into one memory pool, as large as the largest graph needs: they are replayed one after the other."""

    def __init__(self, world: World, group: ProcessGroup):
        """`group`: the ranks that capture and replay together."""
        self.world, self.group = world, group
        self.checked = self.failed = self.required = False
        self.pool: Any = None

    def enabled(self, setting: CudaGraphs) -> Graphs | None:
        """Returns itself for one generation, or None to decode eagerly.

        off   never
        auto  on GPUs. If the first graph fails or differs from eager execution, a warning says why and decoding stays eager from then on
        on    the same, but `capture` raises RuntimeError instead of the warning
        """
        if setting == "off" or (setting == "auto" and (self.failed or not self.world.on_gpu)):
            return None
        self.required, self.failed = setting == "on", False
        self.pool = torch.cuda.graph_pool_handle() if self.world.on_gpu else None
        return self

    def capture(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A graph that replays what `compute` would do now; without a GPU, `compute` itself. `compute` must have run before, work on
        tensors that keep their addresses, leave the same state behind when it runs twice, and not synchronise with the device."""
        if not self.world.on_gpu or self.failed:
            return compute
        return self._captured(compute) if self.checked else self._first(compute)

    def _first(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture and compare with eager execution. All ranks of the group agree: a replay contains their collectives."""
        expected, why, graph = compute().clone(), "", compute
        try:
            graph = self._captured(compute)
        except RuntimeError as error:
            why = f"capture failed: {str(error).splitlines()[0]}"
        problem = self._agreed(why)
        if not problem:
            problem = self._agreed("" if _equal(graph(), expected) else "the captured graph's results differ from eager execution")
        if problem and self.required:
            raise RuntimeError(f"rollout.cuda_graphs=on: {problem}; use rollout.cuda_graphs=off")
        if problem:
            warnings.warn(f"rollout.cuda_graphs=auto: {problem}; decoding without CUDA graphs", stacklevel=2)
        self.checked, self.failed = not problem, bool(problem)
        return compute if problem else graph

    def _agreed(self, why: str) -> str:
        """The first problem that any rank has, on every rank; "" for none."""
        if self.group.size() == 1:
            return why
        problems: list[Any] = [None] * self.group.size()
        dist.all_gather_object(problems, why, group=self.group)
        return next(filter(None, problems), "")

    def _captured(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        from megatron.core.parallel_state import get_global_memory_buffer

        graph = torch.cuda.CUDAGraph()
        # What other threads do with the device, such as nccl's, is no part of it and does not spoil it.
        with without_random_states(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = compute()
        # megatron gathers hidden states in memory that it exchanges when it needs more: the graph goes on using what it knows.
        return _Captured(graph, out, list(get_global_memory_buffer().buffer.values()))


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Whether token ids are equal, and log-probs or hidden states within the rounding of bf16. NaN, which rows of padding may hold, equals
    NaN."""
    if found.dtype == torch.float64 and not torch.isclose(found[0], expected[0], rtol=0, atol=0, equal_nan=True).all():
        return False
    largest = float(expected.abs().nan_to_num().max())
    return bool(torch.isclose(found, expected, rtol=0, atol=2**-6 * largest, equal_nan=True).all())


@dataclass(frozen=True)
class _Captured:
    graph: Any
    out: Tensor
    used: list[Tensor]

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.out.clone()  # the next replay of any graph may write over it
