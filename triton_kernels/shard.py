"""A vocabulary sharded over a process group, and the fixed segments in which a row's softmax is reduced.

A row of logits is reduced in 8 segments of the WHOLE padded vocabulary, with borders at i * V // 8, and the segments are merged in order.
With 1, 2, 4 or 8 ranks each rank holds whole segments, so all of these sizes add the same numbers in the same order, and results are
bitwise equal. With other sizes each rank's columns are split into ceil(8 / ranks) segments: all ranks of a group get the same bits, but
groups of different sizes do not.
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
    """This rank's columns: ids start ... start + size, of which those from `end` on are padding. Real ids are first ... end (exclusive)."""

    start: int
    size: int
    first: int
    end: int
    ranks: int
    group: str

    @staticmethod
    def of(size: int, group: str, start: int, valid: int | None) -> Shard:
        """`size` columns from `start`, sharded in rank order over the process group named `group` ("": not sharded).

        Raises ValueError if `start` is not rank * size.
        """
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
        """Columns that are not padding."""
        return min(max(self.end - self.start, 0), self.size)

    @property
    def segments(self) -> int:
        """Segments of this rank's columns."""
        return -(-SEGMENTS // self.ranks)

    @property
    def widest(self) -> int:
        """Columns of the widest segment; equal for groups of 1, 2, 4 and 8 ranks."""
        return -(-self.size // self.segments)

    @property
    def borders(self) -> list[int]:
        """Borders of this rank's segments in local columns, [segments + 1]."""
        return [i * self.size // self.segments for i in range(self.segments + 1)]

    def check(self, target_N: Tensor) -> None:
        """Raises ValueError for the first target outside the vocabulary. Does nothing for tensors on a device, which would need a
        synchronization."""
        if target_N.device.type != "cpu":
            return
        outside = (target_N < self.first) | (target_N >= self.end)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"target[{row}]={int(target_N[row])} is outside the vocabulary {self.first} ... {self.end - 1}; drop such rows (rows=)"
            )

    def local(self, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """(whether each target is in this rank's columns, its local column or 0)."""
        inside = (target_N >= self.start) & (target_N < self.start + self.size)
        return inside, torch.where(inside, target_N - self.start, 0)

    def gather(self, parts: Tensor) -> Tensor:
        """All-gather each rank's `parts` [segments, ...]: all segments of the vocabulary, in order."""
        if self.ranks == 1:
            return parts
        gathered = parts.new_empty((self.ranks * len(parts), *parts.shape[1:]))
        dist.all_gather_into_tensor(gathered, parts, group=_resolve_process_group(self.group))  # type: ignore[arg-type]
        return gathered
