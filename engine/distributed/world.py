"""The one choice of where a run computes: `cuda` (nccl), `cpu` (gloo) or `meta` (shapes only, any world size)."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from engine.distributed.process_groups import WorldSplit

TIMEOUT = timedelta(minutes=30)  # of a collective: long enough for rank 0 to tokenise a large data set while the others wait

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":16:8", ":4096:8")  # with which cuBLAS repeats itself; the first leaves no room to split sums over blocks, so that a row's
# bits do not depend on how many rows are multiplied with it

Backend = Literal["cuda", "cpu", "meta"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process among all: who it is, where its tensors live, and how ranks talk."""

    backend: Backend
    rank: int
    size: int
    device: torch.device
    parent: WorldSplit | None = None  # to the rest of the launch, where this world is a part of it

    @property
    def on_gpu(self) -> bool:
        return self.backend == "cuda"

    @staticmethod
    def start(seat: Backend | None = None) -> World:
        """Join the world that torchrun describes, or a world of one. On CPU a rank computes on one thread unless OMP_NUM_THREADS says
        otherwise: two ranks of one thread outrun one rank of two."""
        seat = seat or ("cuda" if torch.cuda.is_available() else "cpu")
        if seat == "meta":
            raise ValueError("the meta backend has no processes to start; use World.fake(rank, size)")
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if seat == "cuda":
            device = torch.device(seat, int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
            # Partial sums of a product stay in fp32: rounding them to bf16 saves time where a sum is split, and costs accuracy.
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        else:
            device = torch.device(seat)
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        world = World(seat, rank, size, device)
        if "WORLD_SIZE" in os.environ:
            world._join()
        else:
            world._join(HashStore())
        return world

    def _join(self, store: Store | None = None) -> None:
        """Meet the other ranks of this world: at `store`, or where torchrun says."""
        meeting = {} if store is None else {"store": store, "rank": self.rank, "world_size": self.size}
        own = self.device if self.on_gpu else None
        dist.init_process_group("nccl" if self.on_gpu else "gloo", device_id=own, timeout=TIMEOUT, **meeting)

    def split(self, far: int) -> World:
        """Leave this world for one's own part of it: its last `far` ranks, or the others. All ranks must call it."""
        assert 0 < far < self.size
        store, near = dist.distributed_c10d._get_default_store(), self.size - far
        is_far = self.rank >= near
        rank, size = (self.rank - near, far) if is_far else (self.rank, near)
        dist.destroy_process_group()
        part = replace(self, rank=rank, size=size, parent=WorldSplit(store, near, far, is_far))
        part._join(PrefixStore("far" if is_far else "near", store))
        return part

    @staticmethod
    def fake(rank: int, size: int) -> World:
        """Become any rank of a world of any size, on meta tensors, with collectives that only pretend. Leaves the previous world first."""
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        return World("meta", rank, size, torch.device("meta"))

    def close(self) -> None:
        """Leave the world. A rank that forgets to aborts in its destructor."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def peak_memory_gb(self) -> float:
        """The most memory that this rank has held so far, in 2**30 bytes: allocated on its GPU, or resident on the host."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def rank0_first(self, work: Callable[[], Result]) -> Result:
        """Do `work` on rank 0, then on every other rank: for work that rank 0 leaves on disk for the rest. If rank 0 raises, all
        ranks do."""
        result, failure = None, None
        if self.rank == 0:
            try:
                result = work()
            except Exception as error:
                failure = error
        box = [None if failure is None else f"{type(failure).__name__}: {failure}"]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        if failure is not None:
            raise failure
        if box[0] is not None:
            raise ValueError(f"rank 0 failed: {box[0]}")
        return result if self.rank == 0 else work()  # type: ignore[return-value]

    def first_error(self, problem: str | None) -> str | None:
        """The first problem that any rank has, on every rank; None when none has. All ranks must call it."""
        problems: list[str | None] = [problem]
        if self.size > 1:
            problems = [None] * self.size
            dist.all_gather_object(problems, problem)
        return next((p for p in problems if p is not None), None)


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """While it is open and `on`, a run repeats itself bit for bit on the same machine and layout, at the cost of speed: PyTorch takes the
    deterministic form of each operation, or raises RuntimeError where there is none, and cuBLAS does not split sums.

    Open it before the process first multiplies on a GPU. Raises ValueError where the environment asks cuBLAS for something else.
    """
    if not on:
        yield
        return
    if os.environ.setdefault(CUBLAS, WORKSPACES[0]) not in WORKSPACES:
        raise ValueError(f"{CUBLAS}={os.environ[CUBLAS]} is not deterministic; unset it, or use {' or '.join(WORKSPACES)}")
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # with NaN: it finds faults, and costs a pass over each new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
