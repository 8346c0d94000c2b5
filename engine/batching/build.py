"""Microbatches as tensors: the step of one rank, built from a plan in one pass (csrc/collate.cpp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike

from engine import _C
from engine.batching.plan import Plan, plan
from engine.batching.ragged import OPTIONAL_FIELDS, Arena, Ragged
from engine.types import Packed, Sample, Step

TOKENS_PER_THREAD = 2**19  # below that, starting a thread costs more than it saves


def build(plan: Plan, rank: int, ragged: Ragged | Sequence[Sample], out: Arena | None = None, threads: int = 0) -> Step:
    """The microbatches of one rank as host tensors, in the order of the plan, in one pass; reads nothing of another rank's sequences.

    Padding is a masked sequence of its own with index -1: behind each sequence where plan.seq_multiple asks for it, and at the end up to
    T. An empty microbatch is padding only. The optional fields are those of `ragged`; of Samples, those that no sample of the rank lacks.

    out: memory to build into, which invalidates what was built there before; None: new memory.
    threads: at most so many; 0: as many as pay, of those that torch may use. What is built does not depend on it.

    Raises ValueError for a rank outside the plan, for sequences that are not those planned, and for a field of the wrong length or type.
    """
    if not 0 <= rank < plan.ranks:
        raise ValueError(f"rank={rank} is not in a plan for {plan.ranks} ranks; use 0 to {plan.ranks - 1}")
    slots = slice(rank * plan.microbatches, (rank + 1) * plan.microbatches)
    bounds = plan.offsets[slots.start : slots.stop + 1]
    order_S, totals = plan.order[bounds[0] : bounds[-1]], plan.totals[slots]
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
    """Plans all `samples` by their lengths and groups and builds the step of one rank; see `plan` and `build`."""
    planned = plan(
        [sample.length for sample in samples],
        ranks,
        token_budget,
        cost=cost,
        total_multiple=total_multiple,
        microbatch_multiple=microbatch_multiple,
        group_ids=[sample.group for sample in samples],
        sync="step",  # replicas meet when gradients are reduced
    )
    return build(planned, rank, samples, out)


def scatter(values_per_microbatch: Sequence[torch.Tensor], step: Step, count: int) -> list[torch.Tensor | None]:
    """Cuts per-token values, [..., T] for each microbatch of `step`, back into one [..., L] view for each of the batch's `count` samples.

    A sample of another rank gets None. Raises ValueError if the values do not match the step.
    """
    if len(values_per_microbatch) != len(step):
        raise ValueError(f"values_per_microbatch has {len(values_per_microbatch)} entries for {len(step)} microbatches; give one for each")
    values: list[torch.Tensor | None] = [None] * count
    for j, (values_T, packed) in enumerate(zip(values_per_microbatch, step, strict=True)):
        if values_T.shape[-1:] != packed.tokens_T.shape:
            expected = tuple(packed.tokens_T.shape)
            raise ValueError(f"values_per_microbatch[{j}] has shape {tuple(values_T.shape)}; its microbatch wants {expected}")
        bounds = packed.cu_seqlens.tolist()
        for index, start, end in zip(packed.index_S, bounds[:-1], bounds[1:], strict=True):
            if index >= 0:
                values[index] = values_T[..., start:end]
    return values


def _flat_source(plan: Plan, ragged: Ragged) -> dict[str, Any]:
    """What _C.collate reads, from flat buffers; `fields` are name -> (values, whether each token has its own)."""
    if not np.array_equal(ragged.lengths, plan.lengths):
        raise ValueError("ragged has other lengths than the plan; build from the sequences that were planned")
    per_token = {name: (values, True) for name, values in ragged.per_token.items()}
    per_sequence = {name: (values, False) for name, values in ragged.per_sequence.items()}
    return {"starts": ragged.starts, "tokens": ragged.tokens, "mask": ragged.mask, "fields": per_token | per_sequence}


def _sample_source(plan: Plan, samples: Sequence[Sample], ids: list[int]) -> dict[str, Any]:
    """The same from the samples `ids`, in this order."""
    if len(samples) != len(plan.lengths):
        raise ValueError(f"samples has {len(samples)} entries, the plan {len(plan.lengths)}; build from the samples that were planned")
    mine = {i: samples[i] for i in ids}

    def rows(name: str, dtype: DTypeLike, extra: int = 0) -> list[np.ndarray]:
        return [_row(i, name, getattr(sample, name), dtype, int(plan.lengths[i]) + extra) for i, sample in mine.items()]

    shared = [name for name in OPTIONAL_FIELDS if all(getattr(sample, name) is not None for sample in mine.values())]
    always = {"starts": None, "tokens": rows("tokens", np.int32, extra=1), "mask": rows("mask", np.uint8)}
    return {**always, "fields": {name: (rows(name, np.float32), True) for name in shared}}


def _row(index: int, name: str, value: ArrayLike, dtype: DTypeLike, size: int) -> np.ndarray:
    """One field of one sample, checked, as C++ reads it: contiguous, aligned and of the stated type; copied only if it is not."""
    array = np.asarray(value)
    if array.shape != (size,):
        raise ValueError(f"sample {index}: {name} has shape {array.shape}, but by its planned length it must be ({size},)")
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(f"sample {index}: {name} is {array.dtype}; convert it to {np.dtype(dtype)}")
    return np.require(array, dtype, ["C", "A"])


def _outputs(arena: Arena, size: int, fields: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Memory for what every step has, by the name that _C.collate knows, and for the optional fields."""
    ids = {name: arena.take(name, torch.int32, size) for name in ("tokens_out", "targets_out", "positions_out")}
    values = {name: arena.take(name, torch.float32, size) for name in fields}
    return {**ids, "mask_out": arena.take("mask_out", torch.uint8, size)}, values


def _views(flat: dict[str, torch.Tensor], totals: list[int], cu_seqlens: torch.Tensor, index: list[int], counts: list[int]) -> Step:
    """`flat` cut into microbatches of `totals` tokens and `counts` segments."""
    columns = zip(*(tensor.split(totals) for tensor in flat.values()), strict=True)
    bounds = cu_seqlens.split([count + 1 for count in counts])
    step, end = [], 0
    for column, bound, count in zip(columns, bounds, counts, strict=True):
        index_S = tuple(index[end : end + count])
        end += count
        step.append(Packed(**dict(zip(flat, column, strict=True)), cu_seqlens=bound, index_S=index_S))
    return step
