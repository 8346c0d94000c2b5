"""Build the microbatches of one rank as tensors, from a plan and in one pass over the data (csrc/collate.cpp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike

from engine import _C
from engine.batching.plan import MOST, Plan, plan
from engine.batching.ragged import OPTIONAL_FIELDS, Arena, Ragged
from engine.types import Packed, Sample, Step

TOKENS_PER_THREAD = 2**19  # with fewer tokens per thread, starting a thread costs more than it saves


def build(plan: Plan, rank: int, ragged: Ragged | Sequence[Sample], out: Arena | None = None, threads: int = 0) -> Step:
    """Build the microbatches of `rank` as host tensors, in the order of the plan. The sequences of other ranks are not read.

    Padding forms masked sequences of its own, with index -1: after each sequence, up to a multiple of plan.seq_multiple, and at the end, up
    to T tokens. An empty microbatch is padding only. Optional fields are those of a Ragged; of Samples, those that all of the rank's have.

    ragged: all planned sequences, in the order in which they were planned.
    out: buffers to write into, which invalidates the step built there before; None: allocate.
    threads: maximum number of threads; 0: choose by size, up to torch.get_num_threads(). The result does not depend on it.

    Raises ValueError for an edited plan that is inconsistent, for a rank outside it, for sequences other than the planned ones, and for a
    field of the wrong length or type.
    """
    plan.check()
    if threads < 0:
        raise ValueError(f"threads={threads} must be at least 0; 0 chooses by size")
    if not 0 <= rank < plan.ranks:
        raise ValueError(f"rank={rank} is not in a plan for {plan.ranks} ranks; use 0 to {plan.ranks - 1}")
    slots = slice(rank * plan.microbatches, (rank + 1) * plan.microbatches)
    bounds = plan.offsets[slots.start : slots.stop + 1]
    if not 0 <= bounds[0] <= bounds[-1] <= len(plan.order):
        raise ValueError(f"plan.offsets of rank {rank} is from {bounds[0]} to {bounds[-1]}; it must ascend from 0 to {len(plan.order)}")
    order_S, totals = plan.order[bounds[0] : bounds[-1]], plan.totals[slots]
    if order_S.size and not 0 <= order_S.min() <= order_S.max() < len(plan.lengths):
        raise ValueError(f"plan.order is from {order_S.min()} to {order_S.max()}; it must be from 0 to {len(plan.lengths) - 1}")
    if totals.size and not 1 <= totals.min() <= totals.max() <= MOST:
        raise ValueError(f"plan.totals is from {totals.min()} to {totals.max()}; it must be from 1 to {MOST}")
    source = _flat_source(plan, ragged) if isinstance(ragged, Ragged) else _sample_source(plan, ragged, order_S.tolist())
    size = int(totals.sum())
    fields = source.pop("fields")
    outputs, values = _outputs(out or Arena(), size, fields)
    cu_seqlens, index, counts = _C.collate(
        order_S,
        bounds - bounds[0],
        plan.lengths,
        totals,
        plan.seq_multiple,
        **source,
        fields=[(rows, per_token, values[name].numpy()) for name, (rows, per_token) in fields.items()],
        **{name: tensor.numpy() for name, tensor in outputs.items()},
        threads=threads or max(1, min(size // TOKENS_PER_THREAD, torch.get_num_threads())),
    )
    flat = {
        "tokens_T": outputs["tokens_out"],
        "targets_T": outputs["targets_out"],
        "positions_T": outputs["positions_out"],
        "mask_T": outputs["mask_out"].view(torch.bool),
        **{f"{name}_T": tensor for name, tensor in values.items()},
    }
    return _views(flat, totals.tolist(), torch.from_numpy(cu_seqlens), index.tolist(), counts.tolist())


def batch(
    samples: Sequence[Sample],
    token_budget: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    total_multiple: int = 1,
    microbatch_multiple: int = 1,
    cost: tuple[int, int, int] = (0, 1, 0),
    out: Arena | None = None,
) -> Step:
    """Plan all `samples` by their lengths and groups and build the step of one rank; see `plan` and `build`."""
    planned = plan(
        [sample.length for sample in samples],
        ranks,
        token_budget,
        cost=cost,
        total_multiple=total_multiple,
        microbatch_multiple=microbatch_multiple,
        group_ids=[sample.group for sample in samples],
        sync="step",  # replicas synchronize once per step, in the gradient reduction
    )
    return build(planned, rank, samples, out)


def scatter(values_per_microbatch: Sequence[torch.Tensor], step: Step, count: int) -> list[torch.Tensor | None]:
    """Split per-token values, [..., T] for each microbatch of `step`, into one [..., L] view for each of the batch's `count` samples.

    The entry of a sample of another rank is None. Raises ValueError if the shapes do not match the step.
    """
    if len(values_per_microbatch) != len(step):
        raise ValueError(f"values_per_microbatch has {len(values_per_microbatch)} entries for {len(step)} microbatches; give one for each")
    values: list[torch.Tensor | None] = [None] * count
    for j, (values_T, packed) in enumerate(zip(values_per_microbatch, step, strict=True)):
        if values_T.shape[-1:] != packed.tokens_T.shape:
            expected = tuple(packed.tokens_T.shape)
            raise ValueError(f"values_per_microbatch[{j}] has shape {tuple(values_T.shape)}; its microbatch has shape {expected}")
        bounds = packed.cu_seqlens.tolist()
        for index, start, end in zip(packed.index_S, bounds[:-1], bounds[1:], strict=True):
            if index >= 0:
                values[index] = values_T[..., start:end]
    return values


def _flat_source(plan: Plan, ragged: Ragged) -> dict[str, Any]:
    """Inputs of _C.collate from flat buffers. `fields` maps name -> (values, whether there is one value per token)."""
    if not np.array_equal(ragged.lengths, plan.lengths):
        raise ValueError("ragged has other lengths than the plan; pass the sequences that were planned")
    per_token = {name: (values, True) for name, values in ragged.per_token.items()}
    per_sequence = {name: (values, False) for name, values in ragged.per_sequence.items()}
    return {"starts": ragged.starts, "tokens": ragged.tokens, "mask": ragged.mask, "fields": per_token | per_sequence}


def _sample_source(plan: Plan, samples: Sequence[Sample], ids: list[int]) -> dict[str, Any]:
    """Inputs of _C.collate from the samples with these ids, in this order."""
    if len(samples) != len(plan.lengths):
        raise ValueError(f"samples has {len(samples)} entries, the plan {len(plan.lengths)}; pass the samples that were planned")
    selected = {i: samples[i] for i in ids}

    def rows(name: str, dtype: DTypeLike, extra: int = 0) -> list[np.ndarray]:
        return [_row(i, name, getattr(sample, name), dtype, int(plan.lengths[i]) + extra) for i, sample in selected.items()]

    shared = [name for name in OPTIONAL_FIELDS if all(getattr(sample, name) is not None for sample in selected.values())]
    required = {"starts": None, "tokens": rows("tokens", np.int32, extra=1), "mask": rows("mask", np.uint8)}
    return {**required, "fields": {name: (rows(name, np.float32), True) for name in shared}}


def _row(index: int, name: str, value: ArrayLike, dtype: DTypeLike, size: int) -> np.ndarray:
    """Check one field of one sample and return it contiguous, aligned and of `dtype`, as C++ reads it; copied only if necessary."""
    array = np.asarray(value)
    if array.shape != (size,):
        raise ValueError(f"sample {index}: {name} has shape {array.shape}; its planned length requires ({size},)")
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(f"sample {index}: {name} is {array.dtype}; convert it to {np.dtype(dtype)}")
    return np.require(array, dtype, ["C", "A"])


def _outputs(arena: Arena, size: int, fields: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Allocate (required outputs, by _C.collate's argument names; optional fields, by name), each [size]."""
    ids = {name: arena.take(name, torch.int32, size) for name in ("tokens_out", "targets_out", "positions_out")}
    values = {name: arena.take(name, torch.float32, size) for name in fields}
    return {**ids, "mask_out": arena.take("mask_out", torch.uint8, size)}, values


def _views(flat: dict[str, torch.Tensor], totals: list[int], cu_seqlens: torch.Tensor, index: list[int], counts: list[int]) -> Step:
    """Split the flat tensors into microbatches; microbatch j has totals[j] tokens and counts[j] segments. No copy."""
    columns = zip(*(tensor.split(totals) for tensor in flat.values()), strict=True)
    bounds = cu_seqlens.split([count + 1 for count in counts])
    step, end = [], 0
    for column, bound, count in zip(columns, bounds, counts, strict=True):
        index_S = tuple(index[end : end + count])
        end += count
        step.append(Packed(**dict(zip(flat, column, strict=True)), cu_seqlens=bound, index_S=index_S))
    return step
