"""Sends a policy's weights: to a policy with the same layout, or as Hugging Face tensors to any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import ModelShape
from engine.megatron.backend import Grid
from engine.megatron.model import PackedModel
from engine.megatron.weights import hf_buckets

BUCKET_BYTES = 1 << 30  # weights sent as one tensor


@torch.no_grad()
def sync_same_grid(parameters: Sequence[Tensor], broadcast: Callable[[Tensor], None], *, receives: bool) -> int:
    """Pass this rank's parameters to `broadcast`, one flat bucket at a time; a rank that `receives` copies the bucket back afterwards.

    The other side must have the same parameters: the same rank of an equal layout. Returns the number of bytes.
    """
    for bucket in _buckets(parameters):
        flat = torch.cat([parameter.flatten() for parameter in bucket])
        broadcast(flat)
        if receives:
            for parameter, part in zip(bucket, flat.split([parameter.numel() for parameter in bucket]), strict=True):
                parameter.copy_(part.view_as(parameter))
    return sum(parameter.nbytes for parameter in parameters)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` in order, in groups of at most BUCKET_BYTES: one message per tensor would cost more than its bytes."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(tensor)
    yield bucket


@torch.no_grad()
def hf_weights(chunks: list[PackedModel], model: ModelShape, dtype: torch.dtype, grid: Grid) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor on the host) of every Hugging Face tensor, on the first rank of each replica; nothing on its other ranks.

    Tensor-parallel shards are gathered, and pipeline stages send their tensors to the first stage, one bucket at a time: a rank
    holds at most about BUCKET_BYTES of full tensors, or one tensor if that is larger. All ranks of a replica must exhaust the iterator.
    """
    for stage in range(grid.pp):
        own = hf_buckets(chunks, model, dtype, grid, BUCKET_BYTES) if grid.pp_rank == stage else iter(())
        if stage == 0:
            for bucket in own:
                yield from bucket.items()
        elif grid.tp_rank > 0:
            for _ in own:  # takes part in gathering the shards
                pass
        elif grid.pp_rank == stage:
            _send(own, grid, stage)
        else:
            yield from _receive(grid, stage)


def _send(buckets: Iterator[dict[str, Tensor]], grid: Grid, stage: int) -> None:
    source = dist.get_global_rank(grid.pp_group, stage)
    for bucket in buckets:
        dist.broadcast_object_list([{name: (tensor.shape, tensor.dtype) for name, tensor in bucket.items()}], source, grid.pp_host_group)
        for tensor in bucket.values():
            dist.send(tensor, dist.get_global_rank(grid.pp_group, 0), group=grid.pp_host_group)
    dist.broadcast_object_list([None], source, grid.pp_host_group)


def _receive(grid: Grid, stage: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `stage` on the first stage; on the others only the bucket headers arrive."""
    source = dist.get_global_rank(grid.pp_group, stage)
    while True:
        header: list[dict[str, tuple[torch.Size, torch.dtype]] | None] = [None]
        dist.broadcast_object_list(header, source, grid.pp_host_group)
        if header[0] is None:
            return
        for name, (shape, dtype) in header[0].items() if grid.pp_rank == 0 else ():
            tensor = torch.empty(shape, dtype=dtype)
            dist.recv(tensor, source, group=grid.pp_host_group)
            yield name, tensor
