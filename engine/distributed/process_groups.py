"""Process groups between the two worlds of a launch: training ranks and generation ranks.

After World.split, torch.distributed only knows the ranks of this process's world. Groups that cross both worlds are created here from
the store of the whole launch.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

TIMEOUT = timedelta(days=1)  # one world may wait for a full step or evaluation of the other; a dead peer is detected at once


class CrossGroup:
    """A process group with ranks of both worlds, numbered within the group; for broadcasts."""

    def __init__(self, store: Store, rank: int, size: int, *, on_gpu: bool):
        backend: Any = dist.ProcessGroupNCCL if on_gpu else dist.ProcessGroupGloo
        self.rank, self.on_gpu = rank, on_gpu
        self.group = backend(store, rank, size, TIMEOUT)
        if not on_gpu:
            self.group.barrier().wait()  # gloo would block if a rank left before all have joined

    def broadcast(self, tensor: Tensor, src: int = 0) -> None:
        """Broadcast `tensor` from rank `src` of this group, in place. Blocks until it has arrived."""
        self.group.broadcast(tensor, src).wait()
        if self.on_gpu:
            torch.accelerator.synchronize(tensor.device)

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """Returns rank `src`'s picklable `value` on every rank; the others' values are ignored. Only for gloo groups."""
        data = pickle.dumps(value) if self.rank == src else b""
        size = torch.tensor([len(data)])
        self.broadcast(size, src)
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(size), dtype=torch.uint8)
        self.broadcast(content, src)
        return pickle.loads(content.numpy().tobytes())


@dataclass(frozen=True)
class WorldSplit:
    """The launch that a world is a part of: its first `trainers` ranks are one world, the last `generators` ranks the other."""

    store: Store
    trainers: int
    generators: int
    is_generator: bool  # whether this rank is a generation rank

    def group(self, name: str, rank: int, size: int, *, on_gpu: bool = False) -> CrossGroup:
        """Create or join a group of `size` ranks; each calls this with the same `name` and its own `rank`."""
        return CrossGroup(PrefixStore(name, self.store), rank, size, on_gpu=on_gpu)
