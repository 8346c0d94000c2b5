"""Helpers of the batching tests: valid arguments of plan(), and slow reference implementations in Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from engine.batching.plan import Plan, plan
from engine.batching.ragged import OPTIONAL_FIELDS
from engine.types import Sample


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of plan()."""

    lengths: list[int]
    group_ids: list[int]
    ranks: int
    token_budget: int
    total_multiple: int = 1
    microbatch_multiple: int = 1
    seq_multiple: int = 1
    step_ids: list[int] | None = None
    trained: list[int] | None = None
    cost: tuple[int, int, int] = (0, 1, 0)
    sync: str = "microbatch"
    on_oversize: str = "error"

    def plan(self, **changes: Any) -> Plan:
        return plan(**{**dataclasses.asdict(self), **changes})

    @property
    def capacity(self) -> int:
        return self.token_budget // self.total_multiple * self.total_multiple

    def units(self) -> list[list[int]]:
        """The units that must stay together: the sequences of a group, or a single one."""
        units: dict[tuple[str, int], list[int]] = {}
        for i, group in enumerate(self.group_ids):
            units.setdefault(("group", group) if group >= 0 else ("alone", i), []).append(i)
        return list(units.values())

    def oversize(self) -> set[int]:
        return {i for unit in self.units() if self.tokens(unit) > self.capacity for i in unit}

    def kept(self) -> list[list[int]]:
        """The units that a plan places."""
        dropped = self.oversize() if self.on_oversize == "drop" else set()
        return [unit for unit in self.units() if unit[0] not in dropped]

    def padded(self, i: int) -> int:
        return round_up(self.lengths[i], self.seq_multiple)

    def tokens(self, ids: Sequence[int]) -> int:
        return sum(self.padded(i) for i in ids)

    def cost_of(self, ids: Sequence[int]) -> int:
        c0, c1, c2 = self.cost
        return c0 + sum(c1 * self.padded(i) + c2 * self.padded(i) ** 2 for i in ids)

    def step_of(self, i: int) -> int:
        return self.step_ids[i] if self.step_ids else 0

    def steps(self) -> list[int]:
        return sorted(set(self.step_ids)) if self.step_ids is not None else [0]


def round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


@st.composite
def cases(draw: st.DrawFn, max_size: int = 40) -> Case:
    """Cases that plan() accepts. Oversize units are only generated if they are allowed."""
    total_multiple, seq_multiple = draw(st.integers(1, 9)), draw(st.sampled_from([1, 1, 2, 5]))
    token_budget = draw(st.integers(max(total_multiple, seq_multiple), 80))
    capacity = token_budget // total_multiple * total_multiple
    on_oversize = draw(st.sampled_from(["error", "alone", "drop"]))
    longest = capacity // seq_multiple * seq_multiple if on_oversize == "error" else 100
    lengths = draw(st.lists(st.integers(0, longest) | st.just(longest) | st.just(min(1, longest)), max_size=max_size))

    def column(least: int, most: int) -> st.SearchStrategy[list[int]]:
        return st.lists(st.integers(least, most), min_size=len(lengths), max_size=len(lengths))

    case = Case(
        lengths,
        draw(column(-1, 6)),
        draw(st.integers(1, 6)),
        token_budget,
        total_multiple,
        draw(st.integers(1, 4)),
        seq_multiple,
        draw(st.none() | column(-1, 2)),
        draw(st.none() | column(0, 9)),
        draw(st.sampled_from([(0, 1, 0), (0, 100, 1), (500, 100, 1), (3, 0, 2), (0, 0, 0)])),
        draw(st.sampled_from(["microbatch", "step"])),
        on_oversize,
    )
    return dataclasses.replace(case, group_ids=_possible_groups(case))


def _possible_groups(case: Case) -> list[int]:
    """A sequence gets its own group if its step differs from the group's, or if the group has no room and oversize is not allowed."""
    groups, held, step = list(case.group_ids), dict.fromkeys(case.group_ids, 0), {}
    for i, group in enumerate(groups):
        fits = case.on_oversize != "error" or held[group] + case.padded(i) <= case.capacity
        if step.setdefault(group, case.step_of(i)) != case.step_of(i) or not fits:
            groups[i] = -1
        else:
            held[group] += case.padded(i)
    return groups


def microbatches_of(planned: Plan) -> list[list[list[int]]]:
    """Sequence ids by rank and microbatch, read from order and offsets."""
    m = planned.microbatches
    bounds = planned.offsets.tolist()
    order = planned.order.tolist()
    return [[order[bounds[r * m + j] : bounds[r * m + j + 1]] for j in range(m)] for r in range(planned.ranks)]


def steps_of(planned: Plan) -> Iterator[tuple[int, list[list[list[int]]]]]:
    """Each step's id, and its sequence ids by rank and microbatch."""
    bounds = planned.step_offsets.tolist()
    for s, step in enumerate(planned.step_ids.tolist()):
        yield step, [rank[bounds[s] : bounds[s + 1]] for rank in microbatches_of(planned)]


def best_fit_decreasing(sizes: Sequence[int], capacity: int) -> int:
    """The number of bins of best fit decreasing, by trying every bin for every unit."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [b for b, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= size
        else:
            rooms.append(capacity - size)
    return len(rooms)


def make_samples(case: Case, fields: Sequence[str] = OPTIONAL_FIELDS) -> list[Sample]:
    """One sample for each length, with different token ids, masks and values."""
    rng = np.random.default_rng(len(case.lengths))
    samples = []
    for n, group in zip(case.lengths, case.group_ids, strict=True):
        tokens, mask = rng.integers(1, 2**31, n + 1).astype(np.int32), rng.integers(0, 2, n).astype(np.uint8)
        values: dict[str, Any] = {name: rng.standard_normal(n).astype(np.float32) for name in fields}
        samples.append(Sample(tokens, mask, group, **values))
    return samples


def lognormal(count: int) -> np.ndarray:
    """Realistic rollout lengths, int64 [count]: long-tailed, from 32 to 8192."""
    return np.clip(np.random.default_rng(0).lognormal(6.72, 0.9, count), 32, 8192).astype(np.int64)
