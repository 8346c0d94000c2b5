"""Ranks for tests: processes that join one world and run functions of tests/support/jobs.py until the test run ends.

Starting processes is expensive (each imports torch and megatron-core), so all tests share one world per size, and all ranks are forked
from one server process that has imported the heavy modules and has no threads yet.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

JOB_SECONDS = 240
# Only modules of other projects: modules of this one must be imported from the tests' repository.
PRELOADED = [
    "transformers.models.auto.modeling_auto",
    "megatron.core.models.gpt",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing.serialization",
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
]


def warm() -> ForkServerContext:
    """A multiprocessing context whose processes have the heavy modules already imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Pool:
    """A world of `size` processes."""

    def __init__(self, size: int):
        context = warm()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, job: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Runs job(world, **arguments) on every rank. Returns the results by rank, or raises the first error of any rank."""
        for pipe in self.pipes:
            pipe.send((job, arguments))
        results: dict[int, Any] = {}
        while len(results) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = wait(waiting, timeout=JOB_SECONDS)
            if not ready:
                self.close()
                raise TimeoutError(f"{job.__name__}: ranks {[r for r in range(len(self.pipes)) if r not in results]} did not answer")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = self.pipes.index(pipe)
                failed, results[rank] = pipe.recv()
                if failed:
                    self.close()  # the other ranks may wait for this one forever
                    raise RuntimeError(f"{job.__name__} on rank {rank}:\n{results[rank]}")
        return [results[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        """Ends the processes. The next call of `ranks` with this size starts new ones."""
        for process in self.processes:
            process.kill()
        POOLS.pop(len(self.processes), None)


POOLS: dict[int, Pool] = {}


def ranks(size: int) -> Pool:
    """The test run's world of `size` processes."""
    if size not in POOLS:
        POOLS[size] = Pool(size)
    return POOLS[size]


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    warnings.filterwarnings("ignore")
    gc.freeze()  # modules imported by the server need no garbage collection
    from engine.distributed.world import World

    world = World.start("cpu")
    while True:
        gc.collect()  # destroys the last job's process groups, whose threads wake up a hundred times a second
        try:
            job, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, job(world, **arguments)))
        except Exception:
            pipe.send((True, traceback.format_exc()))
