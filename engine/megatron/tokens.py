"""Sends sampled tokens from the last pipeline stage to the hosts of the other stages.

Every rank plans the next decode batch on its host, from the sampled tokens. They are sent over gloo instead of NCCL: an NCCL receive would
be queued on the GPU a whole pipeline round before the tokens exist, and with CUDA_DEVICE_MAX_CONNECTIONS=1 it would block all kernels that
are launched after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.megatron.backend import Grid

Pending = Callable[[], Tensor]  # blocks until the result is on the host: float64 [2, R], token ids and log-probs
TAG = 1  # of these messages; on CPU, hidden states use tag 0 of the same group


class TokenSender:
    """The messages of one call of generate. With `in_thread`, a thread waits for the GPU and sends, while the main thread launches the next
    batch."""

    def __init__(self, grid: Grid, *, in_thread: bool):
        self.grid = grid
        self.thread = ThreadPoolExecutor(1) if in_thread and grid.pp > 1 and grid.pp_rank == grid.pp - 1 else None
        self.sending: deque[tuple[Any, Tensor]] = deque()  # buffers stay alive until they are received

    def send(self, sampled: Tensor) -> Pending:
        """Last stage only: send `sampled` [2, R] to all other stages. Messages are received in order."""
        ready = _copied_to_host(sampled)
        if self.grid.pp == 1:
            return ready
        if self.thread is not None:
            return self.thread.submit(lambda: self._send(ready())).result
        sent = self._send(ready())
        return lambda: sent

    def receive(self, rows: int) -> Pending:
        """Other stages: the next message, of `rows` rows. The receive is posted when the result is requested."""
        return lambda: self._receive(rows)

    def _send(self, sampled: Tensor) -> Tensor:
        for rank in dist.get_process_group_ranks(self.grid.pp_host_group)[:-1]:
            self.sending.append((dist.isend(sampled, rank, group=self.grid.pp_host_group, tag=TAG), sampled))
        while len(self.sending) > 4 * self.grid.pp**2:  # a round sends pp messages to pp - 1 ranks
            self.sending.popleft()[0].wait()
        return sampled

    def _receive(self, rows: int) -> Tensor:
        sampled = torch.empty(2, rows, dtype=torch.float64)
        dist.recv(sampled, self.grid.last_stage, group=self.grid.pp_host_group, tag=TAG)
        return sampled

    def finish(self) -> None:
        """Wait until every message has been received. Do not call it after a failure: receivers may have exited."""
        if self.thread is not None:
            self.thread.submit(int).result()  # runs after everything submitted before
        while self.sending:
            self.sending.popleft()[0].wait()

    def close(self) -> None:
        """End the thread."""
        if self.thread is not None:
            self.thread.shutdown(wait=False, cancel_futures=True)


def _copied_to_host(sampled: Tensor) -> Pending:
    """Start copying `sampled` to the host."""
    if sampled.device.type == "cpu":
        return lambda: sampled
    copy, done = torch.empty(sampled.shape, dtype=sampled.dtype, pin_memory=True), torch.get_device_module(sampled.device).Event()
    copy.copy_(sampled, non_blocking=True)
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return copy

    return wait
