"""Assign sequences to microbatches and ranks. build.py builds the tensors of one rank from the plan.

A plan is a pure function of the lengths: integer arithmetic, and ties go to the lower index. Every data-parallel rank computes the
same plan and builds its own microbatches without communication. The algorithms are in C++ (csrc/).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from engine import _C

MOST = 2**31 - 1  # cu_seqlens and sequence ids are int32


@dataclass(frozen=True)
class Stats:
    """Quality of a plan. `imbalance` is the slowdown if ranks synchronize once per step, `lockstep` if they synchronize after every
    microbatch. Both are ratios of costs; 1.0 is optimal."""

    fill: float  # tokens / (ranks * M * token_budget)
    imbalance: float  # highest cost of a rank / mean cost of a rank
    lockstep: float  # sum over microbatches of the highest cost on any rank / mean cost of a rank
    algorithms: tuple[str, ...]  # algorithm chosen in each step: see csrc/pack.h; none: no sequences
    dropped: int  # sequences in no microbatch


@dataclass(frozen=True, eq=False)
class Denominators:
    """Loss denominators of each step, summed over all ranks, so that the loss does not depend on the plan. int64 [steps] each."""

    tokens: np.ndarray  # trained tokens
    sequences: np.ndarray  # sequences with a trained token
    groups: np.ndarray  # groups with a trained token; a sequence without a group counts as one


@dataclass(frozen=True, eq=False)
class Plan:
    """Assignment of sequences to microbatches. All ranks have the same number; in each step, a rank's first has the highest cost.

    A slot is rank * M + microbatch. Within a microbatch sequences are ordered by id, except that the sequences of a group stay adjacent.
    """

    order: np.ndarray  # int32: sequence ids, each once; slot s holds order[offsets[s] : offsets[s + 1]]
    offsets: np.ndarray  # int64 [ranks * M + 1]
    inverse: np.ndarray  # int32 [N]: position of each sequence in `order`, -1 if it was dropped
    lengths: np.ndarray  # int64 [N]
    ranks: int
    microbatches: int  # M: microbatches per rank, over all steps
    seq_multiple: int  # each sequence is padded to a multiple of this
    totals: np.ndarray  # int64 [ranks * M]: T, padding included
    cu_seqlens: np.ndarray  # int32: cumulative lengths without padding, S + 1 entries per slot; slot s starts at offsets[s] + s
    cu_seqlens_padded: np.ndarray  # the same with the padding after each sequence
    step_ids: np.ndarray  # int64 [steps], ascending
    step_offsets: np.ndarray  # int64 [steps + 1]: step s is microbatches step_offsets[s] : step_offsets[s + 1] of every rank
    denominators: Denominators
    oversize: np.ndarray  # int32: ids of sequences that fit in no microbatch, alone or with their group
    stats: Stats

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises ValueError for a field of the wrong type, size or range. The values of order, offsets, lengths and totals are checked by
        `build`, for its rank."""
        for name, least, most in (("ranks", 1, MOST), ("microbatches", 0, MOST), ("seq_multiple", 1, MOST)):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or not least <= value <= most:
                raise ValueError(f"plan.{name}={value!r} must be an integer from {least} to {most}")
        slots = int(self.ranks) * int(self.microbatches)
        _check_array("lengths", self.lengths, np.int64, None)
        _check_array("order", self.order, np.int32, None)
        _check_array("step_ids", self.step_ids, np.int64, None)
        _check_array("oversize", self.oversize, np.int32, None)
        _check_array("offsets", self.offsets, np.int64, slots + 1)
        _check_array("totals", self.totals, np.int64, slots)
        _check_array("inverse", self.inverse, np.int32, len(self.lengths))
        _check_array("cu_seqlens", self.cu_seqlens, np.int32, len(self.order) + slots)
        _check_array("cu_seqlens_padded", self.cu_seqlens_padded, np.int32, len(self.order) + slots)
        _check_array("step_offsets", self.step_offsets, np.int64, len(self.step_ids) + 1)
        if (self.offsets[0], self.offsets[-1]) != (0, len(self.order)):
            raise ValueError(f"plan.offsets is from {self.offsets[0]} to {self.offsets[-1]}; it must be from 0 to {len(self.order)}")
        if not isinstance(self.denominators, Denominators):
            raise ValueError(f"plan.denominators is {type(self.denominators).__name__}; pass Denominators")
        for name in ("tokens", "sequences", "groups"):
            _check_array(f"denominators.{name}", getattr(self.denominators, name), np.int64, len(self.step_ids))
        if not isinstance(self.stats, Stats):
            raise ValueError(f"plan.stats is {type(self.stats).__name__}; pass Stats")

    def sequences(self, rank: int, microbatch: int) -> np.ndarray:
        """The ids of the sequences of one microbatch, int32 [S], S may be 0."""
        slot = rank * self.microbatches + microbatch
        return self.order[self.offsets[slot] : self.offsets[slot + 1]]

    def total(self, rank: int, microbatch: int) -> int:
        """T of one microbatch: its padded tokens, rounded up to total_multiple; at least 1."""
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
    """Pack N sequences into microbatches of at most `token_budget` tokens and nearly equal cost, the same number on each of `ranks` ranks.

    No sequence is split, and none is dropped unless on_oversize="drop". Microbatches may be empty if there are few sequences.

    lengths: [N] tokens of each sequence, 0 allowed.       cost: (c0, c1, c2), a microbatch costs c0 + sum over sequences of c1 L + c2 L^2.
    seq_multiple, total_multiple: sequences and microbatches are padded to multiples of these; all padding counts towards token_budget.
    microbatch_multiple: M of each step is a multiple of it.
    group_ids: [N]; equal ids >= 0 share a microbatch, a negative id is alone.
    step_ids: [N]; each id is an optimizer step, planned by itself.       trained: [N] tokens with loss (None: all), for the denominators.
    sync: whether ranks synchronize after every microbatch (FSDP, experts) or once per step; the plan minimizes the time of that case.
    on_oversize: for a sequence or group above the budget: raise an error, put it into a microbatch of its own, or drop it.

    Raises ValueError for a limit below 1, a negative length or cost, a sum of costs above 2**62, more than 2**24 microbatches on all
    ranks, a negative `trained` or one above int32, a group that spans steps, and with on_oversize="error" for a sequence or group above the
    budget.
    """
    _check_choices(cost, sync, on_oversize)
    lengths_N = _integers("lengths", lengths)
    per_sequence = {"group_ids": group_ids, "step_ids": step_ids, "trained": trained}
    columns = {name: None if values is None else _integers(name, values, len(lengths_N)) for name, values in per_sequence.items()}
    result = _C.plan(
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
    dropped = len(lengths_N) - len(result["order"])
    rates = {name: result.pop(name) for name in ("fill", "imbalance", "lockstep")}
    stats = Stats(**rates, algorithms=tuple(result.pop("algorithms")), dropped=dropped)
    denominators = Denominators(**{name: result.pop(f"trained_{name}") for name in ("tokens", "sequences", "groups")})
    return Plan(lengths=lengths_N, ranks=ranks, seq_multiple=seq_multiple, denominators=denominators, stats=stats, **result)


def _check_choices(cost: tuple[int, int, int], sync: str, on_oversize: str) -> None:
    if len(cost) != 3 or not all(0 <= c < 2**62 and c == int(c) for c in cost):
        raise ValueError(f"cost={cost} must be three integers from 0 to 2**62 - 1: per microbatch, per token, per squared length")
    for name, value, allowed in (("sync", sync, ("microbatch", "step")), ("on_oversize", on_oversize, ("error", "alone", "drop"))):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; use {' or '.join(map(repr, allowed))}")


def _check_array(name: str, array: object, dtype: DTypeLike, size: int | None) -> None:
    if not isinstance(array, np.ndarray):
        raise ValueError(f"plan.{name} is {type(array).__name__}; pass a numpy array of {np.dtype(dtype)}")
    if array.dtype != dtype or array.ndim != 1 or not (array.flags.c_contiguous and array.flags.aligned):
        raise ValueError(f"plan.{name} is {array.dtype} of shape {array.shape}; pass contiguous {np.dtype(dtype)} of one dimension")
    if size not in (None, len(array)):
        raise ValueError(f"plan.{name} has {len(array)} entries; the other fields of the plan require {size}")


def _integers(name: str, values: ArrayLike, count: int | None = None) -> np.ndarray:
    """Check `values` and copy them to int64 [N], so that later changes to them do not affect the plan."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}; pass a one-dimensional sequence of integers")
    if count not in (None, len(array)):
        raise ValueError(f"{name} has {len(array)} entries for {count} lengths; give one for each sequence")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} has {array.max()}, which exceeds int64")
    return array.astype(np.int64)
