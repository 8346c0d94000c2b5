"""Every rank of a launch, become in this one process on shapes alone: what its stages hold, and what they do with one microbatch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from engine.config import Model, ModelShape, Optim, Parallel
from engine.distributed.world import World
from engine.dryrun.costs import Axis
from engine.dryrun.meter import Meter
from engine.dryrun.types import Stage, Work
from engine.megatron import optimizers
from engine.megatron.policy import Policy
from engine.megatron.single_stage import SingleStage
from engine.types import Packed

Precision = Literal["bf16", "fp32"]


def simulate_stages(
    model: ModelShape,
    parallel: Parallel,
    world_size: int,
    lengths: Sequence[int],
    *,
    optim: Optim | None,
    rows: int | None = None,
    token_loss: bool = False,
    dtype: Precision = "bf16",
) -> list[Stage]:
    """What a microbatch of sequences of `lengths` tokens (in sum a multiple of tp) costs in each virtual stage of each pipeline rank, in
    order of both; on the first tensor and data parallel rank of each.

    optim   None for a model that is only read: no gradients, no optimizer, nothing held; `forward` is `inference`, `backward` is nothing
    rows    tokens whose log-probs are wanted; None: all
    token_loss  whether the loss is a sum over tokens, of which the output layer makes the gradient in its forward pass

    Ranks that hold alike (as many layers in each stage, no embedding, no head) are rehearsed once. This process leaves the world that it
    is in, and is in none afterwards. Raises ValueError when the grid cannot hold the model.
    """
    parallel.check(model, world_size)
    if sum(lengths) % parallel.tp:
        raise ValueError(f"lengths={list(lengths)}: their sum {sum(lengths)} must be a multiple of parallel.tp={parallel.tp}")
    packed = microbatch(lengths, sum(lengths) if rows is None else rows)
    known: dict[tuple[_Kind, ...], list[Stage]] = {}
    for pp in range(parallel.pp):
        if (kind := _kind(parallel, pp)) not in known:
            with become(model, parallel, world_size, pp, optim, dtype) as policy:
                known[kind] = [_stage(policy, chunk, packed, token_loss) for chunk in range(parallel.vpp)]
    return [replace(stage, pp=pp) for pp in range(parallel.pp) for stage in known[_kind(parallel, pp)]]


@contextmanager
def become(model: ModelShape, parallel: Parallel, world_size: int, pp: int, optim: Optim | None, dtype: Precision) -> Iterator[Policy]:
    """The policy of pipeline rank `pp`'s first rank; the grid, the seat and the world are given back afterwards."""
    world = World.fake(pp * (world_size // parallel.pp), world_size)
    with closing(world), closing(Policy(Model(init=model, dtype=dtype), optim, parallel, world)) as policy:
        yield policy


class _Kind(NamedTuple):
    """What tells one virtual stage from another."""

    first: bool
    last: bool
    layers: int | None  # where they are dealt by hand; otherwise all stages between the ends have as many


def _kind(parallel: Parallel, pp: int) -> tuple[_Kind, ...]:
    """Of each virtual stage of a pipeline rank."""
    last = parallel.pp * parallel.vpp - 1
    places = range(pp, last + 1, parallel.pp)
    return tuple(_Kind(i == 0, i == last, parallel.stages[i] if parallel.stages else None) for i in places)


def microbatch(lengths: Sequence[int], rows: int) -> Packed:
    """Sequences of these lengths, their ids all 0, the first `rows` tokens trained on."""
    tokens_T = torch.zeros(sum(lengths), dtype=torch.int64)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    mask_T = torch.arange(len(tokens_T)) < rows
    return Packed(tokens_T, tokens_T, positions_T, mask_T, cu_seqlens, tuple(range(len(lengths))))


def _stage(policy: Policy, chunk: int, packed: Packed, token_loss: bool) -> Stage:
    inference, inference_peak = _inferred(policy, chunk, packed)
    weights, gradients, optimizer = _lasting(policy, chunk)
    model = policy.chunks[chunk]
    forward, backward, held, peak = inference, Work(), 0, inference_peak
    if policy.optimizer is not None:
        forward, backward, held, peak = _learned(policy, SingleStage(policy, chunk, packed, token_loss=token_loss))
    return Stage(
        pp=policy.grid.pp_rank,
        chunk=chunk,
        layers=len(model.decoder.layers),
        parameters=sum(p.numel() for p in model.parameters()),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        forward=forward,
        backward=backward,
        inference=inference,
        held=held,
        peak=peak,
        inference_peak=inference_peak,
    )


def _inferred(policy: Policy, chunk: int, packed: Packed) -> tuple[Work, int]:
    single = SingleStage(policy, chunk, packed)
    with meter_of(policy) as meter:
        single.infer()
    return meter.taken(), meter.peak


def _learned(policy: Policy, single: SingleStage) -> tuple[Work, Work, int, int]:
    """(forward, backward, held, peak) of a microbatch."""
    with meter_of(policy) as meter:
        single.forward()
        forward, held = meter.taken(), meter.live - single.shared
        single.backward()
    return forward, meter.taken(), held, max(held, meter.peak)


def meter_of(policy: Policy) -> Meter:
    """A meter that knows the axes of this policy's grid."""
    grid = policy.grid
    axes: dict[str, Axis] = {grid.tp_group.group_name: "tp", grid.pp_group.group_name: "pp", grid.dp_group.group_name: "dp"}
    return Meter(policy.world.device, axes)


def _lasting(policy: Policy, chunk: int) -> tuple[int, int, int]:
    """Bytes of a stage's weights, gradients and optimizer: what is between two steps, read off the buffers. The optimizer of a rank is one
    for all its stages, and its state is dealt as the gradients are."""
    of_chunks = [list(each.parameters()) for each in policy.chunks]
    weights = [_bytes(parameters) for parameters in of_chunks]
    if policy.optimizer is None:
        return weights[chunk], 0, 0
    gradients = [_bytes(p.main_grad for p in parameters) for parameters in of_chunks]  # type: ignore[attr-defined]
    everything = _bytes([*optimizers.state_of(policy.optimizer), *(p for parameters in of_chunks for p in parameters)])
    return weights[chunk], gradients[chunk], (everything - sum(weights)) * gradients[chunk] // sum(gradients)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages that these lie in."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
