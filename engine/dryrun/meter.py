"""Measure the Work and the memory of executed torch operations, on meta or real tensors: forward, backward and recomputation."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.dryrun.costs import Axis, Call, cost_of
from engine.dryrun.kernels import KERNELS
from engine.dryrun.types import Work


class Meter(TorchDispatchMode):
    """Context manager that counts the operations executed inside it with tensors on `device`.

    axes    process group name -> axis of the grid

    Memory is that of storages created inside the context: views are not counted twice, the current size of a resized storage counts, and
    earlier allocations (weights, gradient buffers, optimizer) are left out.
    """

    def __init__(self, device: torch.device, axes: Mapping[str, Axis]):
        super().__init__()
        self.device, self.axes = device, axes
        self.peak = 0  # bytes
        self._work = Work()
        self._made: dict[int, weakref.ref[UntypedStorage]] = {}

    @property
    def live(self) -> int:
        """Bytes of storages that were created in this context and still exist."""
        total = 0
        for key, reference in list(self._made.items()):
            storage = reference()
            if storage is None:
                del self._made[key]
            else:
                total += storage.nbytes()
        return total

    def taken(self) -> Work:
        """Return the Work since the last call of this method, and reset it."""
        work, self._work = self._work, Work()
        return work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in self._storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        made = self._storages(out)
        if not given and not made:  # on the host
            return out
        self._made |= {key: weakref.ref(storage) for storage in made if (key := storage._cdata) not in given and not self._knows(key)}
        call = Call.of(func, args, kwargs or {}, out, self.axes)
        cost = (KERNELS.get(call.name, cost_of) if call.space == "trivet" else cost_of)(call)
        self._work += cost.work
        self.peak = max(self.peak, self.live + cost.scratch)
        return out

    def _storages(self, values: Any) -> list[UntypedStorage]:
        return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor) and x.device.type == self.device.type]

    def _knows(self, key: int) -> bool:
        return key in self._made and self._made[key]() is not None
