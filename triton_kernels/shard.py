"""A vocabulary cut over a process group, and the fixed segments in which a row's softmax is summed up.

A row of logits is reduced in 8 segments of the WHOLE padded vocabulary, borders at i * V // 8, and the segments are merged in order.
A rank of 1, 2, 4 or 8 holds whole segments, so that these worlds add the same numbers in the same order: their bits are equal. For
other sizes each rank's columns are cut in ceil(8 / ranks): all ranks of a world agree, but not with worlds of another size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

SEGMENTS = 8


@dataclass(frozen=True)
class Shard:
    """This rank's columns: the ids start ... start + size, of which those from `end` on are padding. Real ids are first ... end."""

    start: int
    size: int
    first: int
    end: int
    ranks: int
    group: str

    @staticmethod
    def of(size: int, group: str, start: int, valid: int | None) -> Shard:
        """`size` columns from `start`, in the order of ranks over the group named `group` ("": the whole vocabulary is here)."""
        if not group:
            end = start + size
            return Shard(start, size, start, end if valid is None else min(valid, end), 1, group)
        process_group = _resolve_process_group(group)  # type: ignore[arg-type]
        ranks, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        if start != rank * size:
            raise ValueError(f"vocab_start={start} of rank {rank} must be {rank * size}: ranks hold {size} ids each, in order")
        return Shard(start, size, 0, ranks * size if valid is None else min(valid, ranks * size), ranks, group)

    @property
    def real(self) -> int:
        """How many of the columns are no padding."""
        return min(max(self.end - self.start, 0), self.size)

    @property
    def segments(self) -> int:
        """In how many segments this rank's columns are cut."""
        return -(-SEGMENTS // self.ranks)

    @property
    def widest(self) -> int:
        """Columns of the widest segment: the same for every world of 1, 2, 4 or 8 ranks."""
        return -(-self.size // self.segments)

    @property
    def borders(self) -> list[int]:
        """Where this rank's segments begin and end, in local columns: [segments + 1]."""
        return [i * self.size // self.segments for i in range(self.segments + 1)]

    def check(self, target_N: Tensor) -> None:
        """ValueError with the first row whose target is no id of the vocabulary. Only in host memory, where looking costs nothing."""
        if target_N.device.type != "cpu":
            return
        outside = (target_N < self.first) | (target_N >= self.end)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"target[{row}]={int(target_N[row])} is outside the vocabulary {self.first} ... {self.end - 1}; drop such rows (rows=)"
            )

    def local(self, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets are among this rank's columns, and the column of each (0 for the others)."""
        inside = (target_N >= self.start) & (target_N < self.start + self.size)
        return inside, torch.where(inside, target_N - self.start, 0)

    def gather(self, parts: Tensor) -> Tensor:
        """Each rank's `parts` [segments, ...], one after the other: all segments of the vocabulary in order. One collective."""
        if self.ranks == 1:
            return parts
        whole = parts.new_empty((self.ranks * len(parts), *parts.shape[1:]))
        dist.all_gather_into_tensor(whole, parts, group=_resolve_process_group(self.group))  # type: ignore[arg-type]
        return whole
