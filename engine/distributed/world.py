"""The world of a process: rank, device and backend, `cuda` (NCCL), `cpu` (gloo) or `meta` (shapes only, any world size)."""

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

TIMEOUT = timedelta(minutes=30)  # of a collective; long enough for rank 0 to tokenize a large data set while the others wait

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":16:8", ":4096:8")  # deterministic cuBLAS workspaces. The first is too small for split-K, so that a row's bits do
# not depend on how many rows are multiplied with it

Backend = Literal["cuda", "cpu", "meta"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The rank, device and backend of this process."""

    backend: Backend
    rank: int
    size: int
    device: torch.device
    parent: WorldSplit | None = None  # the launch, if this world is only a part of it

    @property
    def on_gpu(self) -> bool:
        return self.backend == "cuda"

    @staticmethod
    def start(backend: Backend | None = None) -> World:
        """Join the world that torchrun describes, or a world of one rank. The default backend is cuda if a GPU is available, else cpu.

        On CPU a rank uses one thread unless OMP_NUM_THREADS is set: two ranks of one thread are faster than one rank of two.
        """
        backend = backend or ("cuda" if torch.cuda.is_available() else "cpu")
        if backend == "meta":
            raise ValueError("the meta backend has no processes to start; use World.fake(rank, size)")
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if backend == "cuda":
            device = torch.device(backend, int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
            # Keep partial sums of split products in fp32: rounding them to bf16 saves time and costs accuracy.
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        else:
            device = torch.device(backend)
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        world = World(backend, rank, size, device)
        if "WORLD_SIZE" in os.environ:
            world._join()
        else:
            world._join(HashStore())
        return world

    def _join(self, store: Store | None = None) -> None:
        """Initialize torch.distributed, with `store` or with torchrun's environment variables."""
        rendezvous = {} if store is None else {"store": store, "rank": self.rank, "world_size": self.size}
        own = self.device if self.on_gpu else None
        dist.init_process_group("nccl" if self.on_gpu else "gloo", device_id=own, timeout=TIMEOUT, **rendezvous)

    def split(self, generators: int) -> World:
        """Split the world into its last `generators` ranks and the others; return this rank's new world. All ranks must call it."""
        assert 0 < generators < self.size
        store, trainers = dist.distributed_c10d._get_default_store(), self.size - generators
        is_generator = self.rank >= trainers
        rank, size = (self.rank - trainers, generators) if is_generator else (self.rank, trainers)
        dist.destroy_process_group()
        part = replace(self, rank=rank, size=size, parent=WorldSplit(store, trainers, generators, is_generator))
        part._join(PrefixStore("generators" if is_generator else "trainers", store))
        return part

    @staticmethod
    def fake(rank: int, size: int) -> World:
        """Become rank `rank` of a fake process group of `size` ranks, on meta tensors. Leaves the previous world first."""
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        return World("meta", rank, size, torch.device("meta"))

    def close(self) -> None:
        """Destroy the process group. Without it, the process aborts in the group's destructor at exit."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def gpu_name(self) -> str:
        """torch's name of this rank's GPU, such as "NVIDIA H100 80GB HBM3"; empty on CPU."""
        return torch.cuda.get_device_name(self.device) if self.on_gpu else ""

    def peak_memory_gb(self) -> float:
        """Peak memory of this rank so far, in GiB: allocated on its GPU, or resident on the host."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def rank0_first(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0, then on all other ranks, and return its result: for work whose result rank 0 caches on disk.

        If rank 0 raises, the others raise ValueError.
        """
        result, failure = None, None
        if self.rank == 0:
            try:
                result = work()
            except Exception as error:
                failure = error
        message = [None if failure is None else f"{type(failure).__name__}: {failure}"]
        if self.size > 1:
            dist.broadcast_object_list(message, src=0)
        if failure is not None:
            raise failure
        if message[0] is not None:
            raise ValueError(f"rank 0 failed: {message[0]}")
        return result if self.rank == 0 else work()  # type: ignore[return-value]

    def first_error(self, problem: str | None) -> str | None:
        """Returns the first rank's `problem` that is not None, on every rank; None if no rank has one. All ranks must call it."""
        problems: list[str | None] = [problem]
        if self.size > 1:
            problems = [None] * self.size
            dist.all_gather_object(problems, problem)
        return next((p for p in problems if p is not None), None)


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Context in which, if `on`, runs are bitwise reproducible on the same hardware and layout, at the cost of speed.

    PyTorch uses deterministic kernels, or raises RuntimeError for an operation without one, and cuBLAS does not use split-K. Enter it
    before the first matrix product on a GPU. Raises ValueError if CUBLAS_WORKSPACE_CONFIG is set to a nondeterministic value.
    """
    if not on:
        yield
        return
    if os.environ.setdefault(CUBLAS, WORKSPACES[0]) not in WORKSPACES:
        raise ValueError(f"{CUBLAS}={os.environ[CUBLAS]} is not deterministic; unset it, or use {' or '.join(WORKSPACES)}")
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # filling with NaN finds bugs, but costs a pass over each new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
