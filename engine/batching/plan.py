"""From samples to the microbatches of a rank: `plan` says which sequence goes where, `build` makes the tensors of one rank.

Both are pure. A plan depends on lengths alone, is computed in integers, and ties go to the lower index: so every data-parallel rank
computes the same one from the same lengths and builds its own share without a word to the others. The work is done in C++ (csrc/).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike

from engine import _C
from engine.batching.ragged import OPTIONAL_FIELDS, Arena, Ragged
from engine.types import Packed, Sample, Step

MOST = 2**31 - 1  # cu_seqlens and sequence ids are int32
TOKENS_PER_THREAD = 2**19  # below that, starting a thread costs more than it saves


@dataclass(frozen=True)
class Stats:
    """How good a plan is. `imbalance` slows a step down whose ranks wait for each other once, `lockstep` one whose ranks wait after every
    microbatch; both are 1.0 at best, and in units of cost."""

    fill: float  # tokens / (ranks * M * token_budget)
    imbalance: float  # cost of the costliest rank / mean cost of a rank
    lockstep: float  # sum over microbatches of the costliest rank's / mean cost of a rank
    algorithms: tuple[str, ...]  # what won in each step: level, skewed, by_rank, tight (csrc/pack.h), or none without a sequence
    dropped: int  # sequences that are in no microbatch


@dataclass(frozen=True, eq=False)
class Denominators:
    """What the loss of each step is divided by, summed over all ranks, so that no number depends on the plan: int64 [steps] each."""

    tokens: np.ndarray  # trained tokens
    sequences: np.ndarray  # sequences with a trained token
    groups: np.ndarray  # groups with a trained token; a sequence on its own is one


@dataclass(frozen=True, eq=False)
class Plan:
    """Which sequence goes into which microbatch. Every rank has equally many; in each step a rank's costliest is its first.

    A slot is rank * M + microbatch. Sequences keep the order of their ids within a microbatch, except that a group stays in one piece.
    """

    order: np.ndarray  # int32: sequence ids, each once; slot s holds order[offsets[s] : offsets[s + 1]]
    offsets: np.ndarray  # int64 [ranks * M + 1]
    inverse: np.ndarray  # int32 [N]: place of each sequence in `order`, -1 where it was dropped
    lengths: np.ndarray  # int64 [N], as planned for
    ranks: int
    microbatches: int  # M, of each rank, over all steps
    seq_multiple: int  # each sequence is padded to a multiple of this
    totals: np.ndarray  # int64 [ranks * M]: T, with all padding
    cu_seqlens: np.ndarray  # int32, S + 1 a slot, slot s from offsets[s] + s on: where its sequences begin and end, padding left out
    cu_seqlens_padded: np.ndarray  # the same with each sequence's padding, which lies behind it
    step_ids: np.ndarray  # int64 [steps], ascending
    step_offsets: np.ndarray  # int64 [steps + 1]: step s is microbatches step_offsets[s] : step_offsets[s + 1] of every rank
    denominators: Denominators
    oversize: np.ndarray  # int32: sequences that no microbatch can hold, by themselves or for their group
    stats: Stats

    def sequences(self, rank: int, microbatch: int) -> np.ndarray:
        """The ids of the sequences of one microbatch, int32 [S], S may be 0."""
        slot = rank * self.microbatches + microbatch
        return self.order[self.offsets[slot] : self.offsets[slot + 1]]

    def total(self, rank: int, microbatch: int) -> int:
        """T of one microbatch: its padded tokens rounded up to total_multiple, and never 0."""
        return int(self.totals[rank * self.microbatches + microbatch])


def plan(
    lengths: ArrayLike,
    ranks: int,
    token_budget: int,
    *,
    cost: tuple[int, int, int] = (0, 1, 0),
    seq_multiple: int = 1,
    total_multiple: int = 1,
    microbatch_multiple: int = 1,
    group_ids: ArrayLike | None = None,
    step_ids: ArrayLike | None = None,
    trained: ArrayLike | None = None,
    sync: Literal["microbatch", "step"] = "microbatch",
    on_oversize: Literal["error", "alone", "drop"] = "error",
) -> Plan:
    """Packs N sequences into microbatches of at most `token_budget` tokens, equally many on each of `ranks` ranks, of nearly equal cost.

    No sequence is cut, and none dropped unless on_oversize says so. With fewer sequences than microbatches the rest are empty.

    lengths: [N] tokens of each sequence, 0 allowed.       cost: (c0, c1, c2), a microbatch costs c0 + sum over sequences of c1 L + c2 L^2.
    seq_multiple, total_multiple: sequences and microbatches are padded to multiples of these; all padding counts towards token_budget.
    microbatch_multiple: M of each step is a multiple of it.
    group_ids: [N]; equal ids >= 0 share a microbatch, a negative id is alone.
    step_ids: [N]; each id is an optimizer step, planned by itself.       trained: [N] tokens with loss (None: all), for the denominators.
    sync: whether ranks wait for each other after every microbatch (FSDP, experts) or once a step; that slowdown is minimised.
    on_oversize: what becomes of a sequence or group beyond the budget: refused, put into a microbatch of its own, or dropped.

    Raises ValueError for a limit below 1, a negative length or cost, costs that add up to over 2**62, a group that spans steps, and with
    on_oversize="error" for a sequence or group beyond the budget.
    """
    _check_limits(ranks, token_budget, seq_multiple, total_multiple, microbatch_multiple)
    _check_choices(cost, sync, on_oversize)
    lengths_N = _integers("lengths", lengths)
    per_sequence = {"group_ids": group_ids, "step_ids": step_ids, "trained": trained}
    columns = {name: None if values is None else _integers(name, values, len(lengths_N)) for name, values in per_sequence.items()}
    found = _C.plan(
        lengths_N,
        **columns,
        ranks=ranks,
        token_budget=token_budget,
        cost=cost,
        seq_multiple=seq_multiple,
        total_multiple=total_multiple,
        microbatch_multiple=microbatch_multiple,
        sync=sync,
        on_oversize=on_oversize,
    )
    dropped = len(lengths_N) - len(found["order"])
    rates = {name: found.pop(name) for name in ("fill", "imbalance", "lockstep")}
    stats = Stats(**rates, algorithms=tuple(found.pop("algorithms")), dropped=dropped)
    denominators = Denominators(**{name: found.pop(f"trained_{name}") for name in ("tokens", "sequences", "groups")})
    return Plan(lengths=lengths_N, ranks=ranks, seq_multiple=seq_multiple, denominators=denominators, stats=stats, **found)


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


def _check_limits(ranks: int, token_budget: int, seq_multiple: int, total_multiple: int, microbatch_multiple: int) -> None:
    limits = {"ranks": ranks, "token_budget": token_budget, "seq_multiple": seq_multiple, "total_multiple": total_multiple}
    for name, value in {**limits, "microbatch_multiple": microbatch_multiple}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if token_budget > MOST:
        raise ValueError(f"token_budget={token_budget} exceeds int32 cu_seqlens; lower tokens_per_microbatch to {MOST}")
    if ranks * microbatch_multiple > MOST:
        raise ValueError(f"ranks={ranks} times microbatch_multiple={microbatch_multiple} is over {MOST}; lower one of them")
    for name, multiple in (("seq_multiple", seq_multiple), ("total_multiple", total_multiple)):
        if token_budget < multiple:
            raise ValueError(f"token_budget={token_budget} is below {name}={multiple}; raise tokens_per_microbatch to {multiple} or more")


def _check_choices(cost: tuple[int, int, int], sync: str, on_oversize: str) -> None:
    if len(cost) != 3 or not all(0 <= c < 2**62 and c == int(c) for c in cost):
        raise ValueError(f"cost={cost} must be three integers from 0 to 2**62 - 1: of a microbatch, of a token, of a squared length")
    for name, value, allowed in (("sync", sync, ("microbatch", "step")), ("on_oversize", on_oversize, ("error", "alone", "drop"))):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not known; use {' or '.join(map(repr, allowed))}")


def _integers(name: str, values: ArrayLike, count: int | None = None) -> np.ndarray:
    """A copy as int64 [N], so that a plan does not change with what it was made from."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}; pass a one-dimensional sequence of integers")
    if count not in (None, len(array)):
        raise ValueError(f"{name} has {len(array)} entries for {count} lengths; give one for each sequence")
    return array.astype(np.int64)


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
