"""CUDA graphs for decoding: captured, proven against the launches that they stand for, and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.world import World

Setting = Literal["auto", "on", "off"]  # of rollout.graphs: where they compute the same, or fail, or never


@contextmanager
def without_random_states() -> Iterator[None]:
    """For a forward that learns nothing, and so draws nothing at random: megatron sets the states of generators all the same, around the
    embedding, the layers and what is recomputed, and a GPU's must not be touched while a graph is captured."""
    from megatron.core.tensor_parallel import random

    with mock.patch.object(random.get_cuda_rng_tracker(), "fork", nullcontext), mock.patch.object(random, "_get_all_rng_states", tuple):
        yield


class Graphs:
    """CUDA graphs in one pool of memory, as large as the largest of them needs: they are replayed one after the other."""

    def __init__(self, world: World, group: ProcessGroup):
        """`group`: the ranks that capture together."""
        self.world, self.group = world, group
        self.proven = self.refused = self.insists = False
        self.pool: Any = None

    def asked(self, setting: Setting) -> Graphs | None:
        """Themselves, for a generation; None where it is to do without. With "on", capture raises RuntimeError where the first graph fails
        or computes something else; with "auto" it warns, once, and nothing is captured from then on."""
        if setting == "off" or (setting == "auto" and (self.refused or not self.world.on_gpu)):
            return None
        self.insists, self.refused = setting == "on", False
        self.pool = torch.cuda.graph_pool_handle() if self.world.on_gpu else None
        return self

    def capture(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What does as `compute` would do now, in one launch; without a GPU, `compute`. It has to have run before, to work on tensors that
        stay where they are, to leave the same behind when it runs twice, and not to wait for the device."""
        if not self.world.on_gpu or self.refused:
            return compute
        return self._captured(compute) if self.proven else self._first(compute)

    def _first(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Captured, and compared with `compute`. Whether it is good is for all ranks to say: each replays the others' messages."""
        expected, why, graph = compute().clone(), "", compute
        try:
            graph = self._captured(compute)
        except RuntimeError as error:
            why = f"capture failed: {str(error).splitlines()[0]}"
        if not (said := self._agreed(why)) and not _alike(graph(), expected):
            why = "a captured wave computes other numbers than its launches one by one"
        said = said or self._agreed(why)
        if said and self.insists:
            raise RuntimeError(f"rollout.graphs=on: {said}; use rollout.graphs=off")
        if said:
            warnings.warn(f"rollout.graphs: {said}; decoding goes on without CUDA graphs", stacklevel=2)
        self.proven, self.refused = not said, bool(said)
        return compute if said else graph

    def _agreed(self, why: str) -> str:
        """A reason of any rank, on every rank; "" for none."""
        if self.group.size() == 1:
            return why
        reasons: list[Any] = [None] * self.group.size()
        dist.all_gather_object(reasons, why, group=self.group)
        return next(filter(None, reasons), "")

    def _captured(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        from megatron.core.parallel_state import get_global_memory_buffer

        graph = torch.cuda.CUDAGraph()
        # What other threads do with the device, such as nccl's, is no part of it and does not spoil it.
        with without_random_states(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = compute()
        # megatron gathers hidden states in memory that it exchanges when it needs more: the graph goes on using what it knows.
        return _Captured(graph, out, list(get_global_memory_buffer().buffer.values()))


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two runs of one computation agree: drawn tokens to the last bit, log-probs and hidden states to the rounding of bf16."""
    same = found.dtype != torch.float64 or torch.equal(found[0], expected[0])
    return same and bool((found - expected).abs().max() <= 2**-6 * expected.abs().max())


@dataclass(frozen=True)
class _Captured:
    graph: Any
    out: Tensor
    used: list[Tensor]

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.out.clone()  # the next replay of any graph may write over it
