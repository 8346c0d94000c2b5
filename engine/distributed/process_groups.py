"""Two worlds in one launch, and what crosses from one to the other. torch.distributed knows each rank's own world alone: what
leads to the other is made here of the store that all of them met at."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

PATIENCE = timedelta(days=1)  # one side waits for as long as a step or an evaluation of the other takes; a dead peer is noticed at once


class CrossGroup:
    """Ranks of both worlds, numbered for the purpose, of which one speaks and the others listen."""

    def __init__(self, store: Store, rank: int, size: int, *, on_gpu: bool):
        backend: Any = dist.ProcessGroupNCCL if on_gpu else dist.ProcessGroupGloo
        self.rank, self.on_gpu = rank, on_gpu
        self.group = backend(store, rank, size, PATIENCE)
        if not on_gpu:
            self.group.barrier().wait()  # none leaves before all have come: gloo would have the last wait for it

    def broadcast(self, tensor: Tensor, speaker: int = 0) -> None:
        """The speaker's tensor becomes everyone's; it has arrived when this returns."""
        self.group.broadcast(tensor, speaker).wait()
        if self.on_gpu:
            torch.accelerator.synchronize(tensor.device)

    def broadcast_object(self, thing: Any, speaker: int = 0) -> Any:
        """The speaker's `thing`, whatever it is, told to everyone (whose own is not looked at). For lines on host memory."""
        data = pickle.dumps(thing) if self.rank == speaker else b""
        size = torch.tensor([len(data)])
        self.broadcast(size, speaker)
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(size), dtype=torch.uint8)
        self.broadcast(content, speaker)
        return pickle.loads(content.numpy().tobytes())


@dataclass(frozen=True)
class WorldSplit:
    """What a rank knows of the launch that its world is a part of: the first `near` ranks are one world, the other `far` the other."""

    store: Store
    trainers: int
    generators: int
    is_generator: bool  # this rank

    def group(self, name: str, rank: int, size: int, *, on_gpu: bool = False) -> CrossGroup:
        """A line of `size` ranks, each of which calls this with the same `name` and a `rank` of its own."""
        return CrossGroup(PrefixStore(name, self.store), rank, size, on_gpu=on_gpu)
