"""From samples to the microbatches of a rank: `plan` says which sequence goes where, `build` makes the tensors of one rank.

Both are pure. A plan depends on lengths alone and ties go to the lower index, so every data-parallel rank computes the same one from the
same lengths and builds its own share without a word to the others. The work is done in C++ (csrc/pack.h, csrc/collate.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike

from engine import _C
from engine.types import Packed, Sample, Step

OPTIONAL_FIELDS = ("advantage", "old_logprob", "ref_logprob", "value", "returns")  # a Sample's [L], a Packed's <name>_T
MAX_TOKENS = 2**31 - 1  # cu_seqlens is int32


@dataclass(frozen=True)
class Stats:
    """How good a plan is: 1.0 is perfect for both."""

    fill: float  # tokens / (ranks * M * token_budget)
    imbalance: float  # tokens of the heaviest rank / mean tokens of a rank


@dataclass(frozen=True, eq=False)
class Plan:
    """Which sequence goes into which microbatch. Every rank has equally many microbatches, each rank's heaviest is its first."""

    order: np.ndarray  # int64 [N], each sequence id once
    offsets: np.ndarray  # int64 [ranks * M + 1], into order
    lengths: np.ndarray  # int64 [N], as planned for
    ranks: int
    microbatches: int  # M, of each rank
    total_multiple: int  # every T is a multiple of this
    stats: Stats

    def sequences(self, rank: int, microbatch: int) -> np.ndarray:
        """The ids of the sequences of one microbatch, int64 [S], S may be 0."""
        slot = rank * self.microbatches + microbatch
        return self.order[self.offsets[slot] : self.offsets[slot + 1]]

    def total(self, rank: int, microbatch: int) -> int:
        """T of one microbatch: its tokens rounded up to total_multiple, and never 0."""
        tokens = int(self.lengths[self.sequences(rank, microbatch)].sum())
        return -(-max(tokens, 1) // self.total_multiple) * self.total_multiple


def plan(
    lengths: ArrayLike,
    ranks: int,
    token_budget: int,
    *,
    total_multiple: int = 1,
    microbatch_multiple: int = 1,
    group_ids: ArrayLike | None = None,
) -> Plan:
    """Packs N sequences into microbatches of at most `token_budget` tokens, equally many on each of `ranks` ranks.

    First-fit decreasing finds the number of microbatches; the heaviest are then halved until their number is a multiple of
    ranks * microbatch_multiple, and dealt so that ranks hold nearly equal tokens. No sequence is dropped or cut. With fewer sequences than
    microbatches the rest are empty; with none at all there are no microbatches.

    lengths: [N] tokens of each sequence, 0 allowed.       group_ids: [N]; equal ids >= 0 share a microbatch, a negative id is alone.
    total_multiple: every T is padded to a multiple of it, and stays within token_budget with that padding.

    Raises ValueError for a limit below 1, a negative length, and a sequence or group longer than the budget.
    """
    _check_limits(ranks, token_budget, total_multiple, microbatch_multiple)
    lengths_N = _integers("lengths", lengths)
    groups_N = None if group_ids is None else _integers("group_ids", group_ids)
    if groups_N is not None and len(groups_N) != len(lengths_N):
        raise ValueError(f"group_ids has {len(groups_N)} entries for {len(lengths_N)} lengths; give one for each sequence, -1 for alone")
    order, offsets, microbatches = _C.pack(lengths_N, groups_N, ranks, token_budget, total_multiple, microbatch_multiple)
    stats = _stats(lengths_N[order], offsets, ranks, token_budget)
    return Plan(order, offsets, lengths_N, ranks, microbatches, total_multiple, stats)


def build(plan: Plan, rank: int, samples: Sequence[Sample]) -> Step:
    """The microbatches of one rank as host tensors, in the order of the plan; reads no sample of another rank.

    T is rounded up to plan.total_multiple; the padding is a last sequence of its own with index -1. An empty microbatch is padding only.
    advantage_T, old_logprob_T, ref_logprob_T and value_T are there if no sample of the rank lacks them, so also if it has no sample.

    Raises ValueError for a rank outside the plan, for samples that are not those planned, and for a field of the wrong length or type.
    """
    if not 0 <= rank < plan.ranks:
        raise ValueError(f"rank={rank} is not in a plan for {plan.ranks} ranks; use 0 to {plan.ranks - 1}")
    if len(samples) != len(plan.lengths):
        raise ValueError(f"samples has {len(samples)} entries, the plan {len(plan.lengths)}; build from the samples that were planned")
    shares = [plan.sequences(rank, j).tolist() for j in range(plan.microbatches)]
    mine = {i: samples[i] for share in shares for i in share}
    optional = [name for name in OPTIONAL_FIELDS if all(getattr(sample, name) is not None for sample in mine.values())]
    return [_pack({i: mine[i] for i in share}, plan.lengths, plan.total(rank, j), optional) for j, share in enumerate(shares)]


def batch(
    samples: Sequence[Sample], token_budget: int, *, rank: int = 0, ranks: int = 1, total_multiple: int = 1, microbatch_multiple: int = 1
) -> Step:
    """Plans all `samples` by their lengths and groups and builds the step of one rank; see `plan` and `build`."""
    lengths = [sample.length for sample in samples]
    groups = [sample.group for sample in samples]
    planned = plan(lengths, ranks, token_budget, total_multiple=total_multiple, microbatch_multiple=microbatch_multiple, group_ids=groups)
    return build(planned, rank, samples)


def scatter(values_per_microbatch: Sequence[torch.Tensor], step: Step, count: int) -> list[torch.Tensor | None]:
    """Cuts per-token values ([T] for each microbatch of `step`) back into one [L] view for each of the `count` samples of the batch.

    A sample of another rank gets None. Raises ValueError if the values do not match the step.
    """
    if len(values_per_microbatch) != len(step):
        raise ValueError(f"values_per_microbatch has {len(values_per_microbatch)} entries for {len(step)} microbatches; give one for each")
    values: list[torch.Tensor | None] = [None] * count
    for j, (values_T, packed) in enumerate(zip(values_per_microbatch, step, strict=True)):
        if values_T.shape != packed.tokens_T.shape:
            expected = tuple(packed.tokens_T.shape)
            raise ValueError(f"values_per_microbatch[{j}] has shape {tuple(values_T.shape)}; its microbatch wants {expected}")
        bounds = packed.cu_seqlens.tolist()
        for index, start, end in zip(packed.index_S, bounds[:-1], bounds[1:], strict=True):
            if index >= 0:
                values[index] = values_T[start:end]
    return values


def _check_limits(ranks: int, token_budget: int, total_multiple: int, microbatch_multiple: int) -> None:
    limits = {"ranks": ranks, "token_budget": token_budget, "total_multiple": total_multiple, "microbatch_multiple": microbatch_multiple}
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if token_budget > MAX_TOKENS:
        raise ValueError(f"token_budget={token_budget} exceeds int32 cu_seqlens; lower tokens_per_microbatch to {MAX_TOKENS}")
    if token_budget < total_multiple:
        raise ValueError(
            f"token_budget={token_budget} is below total_multiple={total_multiple}; raise tokens_per_microbatch to {total_multiple} or more"
        )


def _integers(name: str, values: ArrayLike) -> np.ndarray:
    """A copy as int64 [N], so that a plan does not change with what it was made from."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}; pass a one-dimensional sequence of integers")
    return array.astype(np.int64)


def _stats(plan_lengths: np.ndarray, offsets: np.ndarray, ranks: int, token_budget: int) -> Stats:
    """plan_lengths: the lengths in the order of the plan, int64 [N]."""
    bounds = np.concatenate(([0], np.cumsum(plan_lengths)))[offsets]
    tokens, microbatches = int(bounds[-1]), len(offsets) - 1
    if tokens == 0:
        return Stats(fill=0.0, imbalance=1.0)
    per_rank = np.diff(bounds[:: microbatches // ranks])
    return Stats(fill=tokens / (microbatches * token_budget), imbalance=int(per_rank.max()) * ranks / tokens)


def _pack(samples: dict[int, Sample], lengths: np.ndarray, total: int, optional: list[str]) -> Packed:
    def columns(name: str, dtype: DTypeLike, extra: int = 0) -> list[np.ndarray]:
        return [_column(i, name, getattr(sample, name), dtype, int(lengths[i]) + extra) for i, sample in samples.items()]

    tokens, masks = columns("tokens", np.int32, extra=1), columns("mask", np.uint8)
    tokens_T, targets_T, positions_T, mask_T, cu_seqlens = map(torch.from_numpy, _C.collate(tokens, masks, total))
    padding = (-1,) * (len(cu_seqlens) - 1 - len(samples))
    values = {f"{name}_T": torch.from_numpy(_C.collate_values(columns(name, np.float32), total)) for name in optional}
    return Packed(tokens_T, targets_T, positions_T, mask_T.view(torch.bool), cu_seqlens, (*samples, *padding), **values)


def _column(index: int, name: str, value: ArrayLike, dtype: DTypeLike, size: int) -> np.ndarray:
    """One field of one sample, checked, as C++ reads it: contiguous, aligned and of the stated type; copied only if it is not."""
    array = np.asarray(value)
    if array.shape != (size,):
        raise ValueError(f"sample {index}: {name} has shape {array.shape}, but by its planned length it must be ({size},)")
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(f"sample {index}: {name} is {array.dtype}; convert it to {np.dtype(dtype)}")
    return np.require(array, dtype, ["C", "A"])
