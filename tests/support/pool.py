"""Ranks for tests: processes that join one world, and run functions of tests/support/jobs.py until the test run ends.

Starting processes is dear (each imports torch and megatron-core), so all tests share one world of each size.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from typing import Any

JOB_SECONDS = 240


class Pool:
    """A world of `size` processes."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("spawn")
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
        """job(world, **arguments) on every rank; what each returned, by rank. The first failure of any rank is raised here."""
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
                    self.close()  # the other ranks may wait for this one for ever
                    raise RuntimeError(f"{job.__name__} on rank {rank}:\n{results[rank]}")
        return [results[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        """End the processes; the next call of `ranks` starts others."""
        for process in self.processes:
            process.kill()
        ranks.cache_clear()


@lru_cache
def ranks(size: int) -> Pool:
    """The test run's world of `size` processes."""
    return Pool(size)


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
    from engine.distributed.world import World

    world = World.start("cpu")
    while True:
        try:
            job, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, job(world, **arguments)))
        except Exception:
            pipe.send((True, traceback.format_exc()))
