"""What the last stage of a pipeline draws, told to the host of every stage.

Ranks plan the next wave from the tokens, on the host, and so the tokens go from host to host. A receive in a GPU's queue would wait there
until the tokens are drawn, a whole round of the pipeline later, and with CUDA_DEVICE_MAX_CONNECTIONS=1 all kernels that are launched after
it would wait too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.megatron.seat import Grid

Told = Callable[[], Tensor]  # waits for what was drawn: float64 [2, R] on the host, tokens and log-probs
TAG = 1  # of these messages; hidden states have 0 where they go over the same group


class Tokens:
    """`beside`: a thread waits for what the GPU draws and sends it, while the other launches the next wave. Without, the tokens are there
    when they are to be sent."""

    def __init__(self, grid: Grid, *, beside: bool):
        self.grid = grid
        self.thread = ThreadPoolExecutor(1) if beside and grid.pp > 1 and grid.pp_rank == grid.pp - 1 else None
        self.sending: deque[tuple[Any, Tensor]] = deque()  # a send waits for its receiver: kept until it has come

    def tell(self, both: Tensor) -> Told:
        """On the last stage: send what was drawn to the other stages. Every wave's in order."""
        ready = _on_host(both)
        if self.thread is not None:
            return self.thread.submit(lambda: self._send(ready())).result
        if self.grid.pp > 1:
            self._send(ready())
        return ready

    def expect(self, draws: int) -> Told:
        """On the other stages: what was drawn of the next wave that was not asked for yet, `draws` rows."""
        return lambda: self._receive(draws)

    def _send(self, drawn: Tensor) -> Tensor:
        for rank in dist.get_process_group_ranks(self.grid.pp_hosts)[:-1]:
            self.sending.append((dist.isend(drawn, rank, group=self.grid.pp_hosts, tag=TAG), drawn))
        while len(self.sending) > 4 * self.grid.pp**2:  # a round has pp waves, each sent to pp - 1 ranks
            self.sending.popleft()[0].wait()
        return drawn

    def _receive(self, draws: int) -> Tensor:
        drawn = torch.empty(2, draws, dtype=torch.float64)
        dist.recv(drawn, self.grid.last_stage, group=self.grid.pp_hosts, tag=TAG)
        return drawn

    def close(self) -> None:
        """Wait until all that was sent has come."""
        if self.thread is not None:
            self.thread.shutdown()
        for work, _ in self.sending:
            work.wait()


def _on_host(drawn: Tensor) -> Told:
    """What was drawn, as soon as the device is that far: it is not waited for here."""
    if drawn.device.type == "cpu":
        return lambda: drawn
    copy, done = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True), torch.get_device_module(drawn.device).Event()
    copy.copy_(drawn, non_blocking=True)
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return copy

    return wait
