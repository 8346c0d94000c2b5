"""Simulate every pipeline rank of a launch in this process, on meta tensors: memory and cost of its stages for one microbatch."""

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
    """Simulate one microbatch and return its stages, ordered by pipeline rank and chunk, for the first tensor and data parallel rank.

    lengths     tokens of each sequence; the sum must be a multiple of tp
    optim       None for a frozen model: no gradients, no optimizer, no held activations; `forward` equals `inference`, `backward` is empty
    rows        number of tokens whose log-probs are needed; None: all
    token_loss  whether the loss is a sum over tokens, for which the output layer computes gradients in its forward pass

    Ranks with equal stages (number of layers, no embedding, no head) are simulated once. This process leaves its process group and is in
    none afterwards. Raises ValueError if the grid does not fit the model.
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
    """Yield the policy of the first rank of pipeline rank `pp`, on meta tensors. The grid and the fake process group are destroyed
    afterwards."""
    world = World.fake(pp * (world_size // parallel.pp), world_size)
    with closing(world), closing(Policy(Model(init=model, dtype=dtype), optim, parallel, world)) as policy:
        yield policy


class _Kind(NamedTuple):
    """Properties by which virtual stages differ."""

    first: bool
    last: bool
    layers: int | None  # with explicit parallel.stages; None: all stages between the ends have the same number


def _kind(parallel: Parallel, pp: int) -> tuple[_Kind, ...]:
    """The kinds of all virtual stages of a pipeline rank."""
    last = parallel.pp * parallel.vpp - 1
    places = range(pp, last + 1, parallel.pp)
    return tuple(_Kind(i == 0, i == last, parallel.stages[i] if parallel.stages else None) for i in places)


def microbatch(lengths: Sequence[int], rows: int) -> Packed:
    """A Packed of sequences of these lengths, with token id 0 and a mask of 1 for the first `rows` tokens."""
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
    """(forward, backward, held bytes, peak bytes) of a microbatch."""
    with meter_of(policy) as meter:
        single.forward()
        forward, held = meter.taken(), meter.live - single.shared
        single.backward()
    return forward, meter.taken(), held, max(held, meter.peak)


def meter_of(policy: Policy) -> Meter:
    """A Meter with the process groups of this policy's grid."""
    grid = policy.grid
    axes: dict[str, Axis] = {grid.tp_group.group_name: "tp", grid.pp_group.group_name: "pp", grid.dp_group.group_name: "dp"}
    return Meter(policy.world.device, axes)


def _lasting(policy: Policy, chunk: int) -> tuple[int, int, int]:
    """Bytes of a stage's (weights, gradients, optimizer state) between two steps. A rank has one optimizer for all its stages; its state is
    divided among them in proportion to their gradients."""
    of_chunks = [list(each.parameters()) for each in policy.chunks]
    weights = [_bytes(parameters) for parameters in of_chunks]
    if policy.optimizer is None:
        return weights[chunk], 0, 0
    gradients = [_bytes(p.main_grad for p in parameters) for parameters in of_chunks]  # type: ignore[attr-defined]
    total = _bytes([*optimizers.state_of(policy.optimizer), *(p for parameters in of_chunks for p in parameters)])
    return weights[chunk], gradients[chunk], (total - sum(weights)) * gradients[chunk] // sum(gradients)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of `tensors`, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
