"""The sequence planners of published engines, reimplemented in plain Python, and statistics of a placement.

A planner maps (lengths, costs, ranks, budget) to the sequence ids of every microbatch, by rank. If the number of bins is no multiple of
the ranks, the fullest bins are split. Bins are distributed round-robin.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Bins = list[list[int]]
Placement = list[Bins]  # by rank, by microbatch
Planner = Callable[[Sequence[int], Sequence[int], int, int], Placement]


@dataclass(frozen=True)
class TwoStage:
    """A planner in two stages. First, one process balances costs over the ranks, with equally many sequences each. Then every rank balances
    costs over its microbatches, as many as the fullest rank needs."""

    over: Callable[[Sequence[int], int], Bins]  # (costs, ranks) -> sequence ids by rank
    within: Callable[[list[int], Sequence[int], int], Bins]  # (share of a rank, costs, microbatches) -> sequence ids by microbatch


@dataclass(frozen=True)
class PlacementStats:
    """Statistics of a placement; definitions as in engine.batching.plan.Stats."""

    microbatches: int  # of the rank with most
    fill: float  # tokens / (ranks * microbatches * budget)
    imbalance: float
    lockstep: float
    dropped: float  # share of tokens that are in no microbatch
    over: int  # microbatches over the budget


def placement_stats(placement: Placement, lengths: Sequence[int], costs: Sequence[int], budget: int) -> PlacementStats:
    """Assumes that ranks wait for each other, also ranks without a microbatch in a round in which another has one."""
    loads = [sorted((sum(costs[i] for i in ids) for ids in rank), reverse=True) for rank in placement]
    rounds = max(map(len, loads))
    mean = sum(map(sum, loads)) / len(placement)
    tokens = [sum(lengths[i] for i in ids) for rank in placement for ids in rank]
    return PlacementStats(
        microbatches=rounds,
        fill=sum(tokens) / (len(placement) * rounds * budget),
        imbalance=max(map(sum, loads)) / mean,
        lockstep=sum(max(load[j] for load in loads if j < len(load)) for j in range(rounds)) / mean,
        dropped=1 - sum(tokens) / sum(lengths),
        over=sum(count > budget for count in tokens),
    )


def next_fit(lengths: Sequence[int], costs: Sequence[int], ranks: int, budget: int) -> Placement:
    """In order of arrival, into the open microbatch or a new one."""
    bins: Bins = [[]]
    room = budget
    for i, length in enumerate(lengths):
        if length > room:
            bins.append([])
            room = budget
        bins[-1].append(i)
        room -= length
    return distribute(bins, lengths, ranks)


def first_fit_decreasing(lengths: Sequence[int], costs: Sequence[int], ranks: int, budget: int) -> Placement:
    """Longest first, into the first of all bins with room."""
    bins: Bins = []
    rooms: list[int] = []
    for i in longest_first(lengths):
        length = lengths[i]
        for b, room in enumerate(rooms):
            if room >= length:
                bins[b].append(i)
                rooms[b] -= length
                break
        else:
            bins.append([i])
            rooms.append(budget - length)
    return distribute(bins, lengths, ranks)


def modified_first_fit_decreasing(lengths: Sequence[int], costs: Sequence[int], ranks: int, budget: int) -> Placement:
    """Johnson and Garey 1985. Each sequence over half a budget gets a bin. Forwards, each bin gets one sequence over a third, if one fits.
    Backwards, each bin without one gets two sequences over a sixth. Forwards, each bin gets whatever fits. The rest is placed first fit
    decreasing."""
    order = longest_first(lengths)
    large = [i for i in order if lengths[i] > budget / 2]
    medium = [i for i in order if budget / 3 < lengths[i] <= budget / 2]
    small = [i for i in order if budget / 6 < lengths[i] <= budget / 3]
    tiny = [i for i in order if lengths[i] <= budget / 6]
    bins = [[i] for i in large]
    rooms = [budget - lengths[i] for i in large]

    def put(b: int, items: list[int], at: int) -> None:
        item = items.pop(at)
        bins[b].append(item)
        rooms[b] -= lengths[item]

    for b in range(len(bins)):  # forwards: the longest medium one that fits
        if (at := fitting(medium, lengths, rooms[b])) < len(medium):
            put(b, medium, at)
    for b in reversed(range(len(bins))):  # backwards: the shortest small one, then the longest that fits with it
        if len(bins[b]) == 1 and len(small) > 1 and lengths[small[-1]] + lengths[small[-2]] <= rooms[b]:
            put(b, small, len(small) - 1)
            put(b, small, fitting(small, lengths, rooms[b]))
    rest = sorted([*medium, *small, *tiny], key=lambda i: -lengths[i])
    for b in range(len(bins)):  # forwards: whatever fits, longest first
        while (at := fitting(rest, lengths, rooms[b])) < len(rest):
            put(b, rest, at)
    again = first_fit_decreasing([lengths[i] for i in rest], [], 1, budget)[0]
    return distribute(bins + [[rest[i] for i in ids] for ids in again], lengths, ranks)


def rounds_needed(shares: Bins, lengths: Sequence[int], budget: int) -> int:
    return max(-(-sum(lengths[i] for i in share) // budget) for share in shares)


def over_ranks(costs: Sequence[int], ranks: int) -> Bins:
    short = -len(costs) % ranks  # the last set is padded with empty sequences
    shares = largest_differencing([*costs, *[0] * short], ranks, equal_size=True)
    return [[i for i in share if i < len(costs)] for share in shares]


def within_rank(share: list[int], costs: Sequence[int], rounds: int) -> Bins:
    return [[share[i] for i in part] for part in largest_differencing([costs[i] for i in share], rounds)]


def largest_differencing(costs: Sequence[int], parts: int, equal_size: bool = False) -> Bins:
    """Karmarkar and Karp 1982 for any number of parts: the two partial partitions with the largest spread are merged, heaviest part with
    lightest, until one is left. equal_size: all parts get equally many; len(costs) must be a multiple of `parts`."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], i))
    chunk = parts if equal_size else 1
    states = []
    for start in range(0, len(order), chunk):
        held = [(costs[i], [i]) for i in reversed(order[start : start + chunk])]
        states.append((held[-1][0] * (len(held) == parts) - held[0][0], start, held + [(0, []) for _ in range(parts - len(held))]))
    heapq.heapify(states)
    while len(states) > 1:
        _, first, heavy = heapq.heappop(states)
        _, _, light = heapq.heappop(states)
        merged = [(a + b, ids + others) for (a, ids), (b, others) in zip(heavy, reversed(light), strict=True)]
        merged.sort(key=lambda part: -part[0])
        heapq.heappush(states, (merged[-1][0] - merged[0][0], first, merged))
    return [ids for _, ids in states[0][2]]


def longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def fitting(items: Sequence[int], lengths: Sequence[int], room: int) -> int:
    """The index of the first item that fits into `room`; `items` are sorted longest first."""
    return bisect_right(items, -room - 1, key=lambda i: -lengths[i])


def distribute(bins: Bins, lengths: Sequence[int], ranks: int) -> Placement:
    """Splits the fullest bins until all ranks get equally many, and distributes them round-robin."""
    fullest = [(-sum(lengths[i] for i in ids), b) for b, ids in enumerate(bins)]
    heapq.heapify(fullest)
    while len(bins) % ranks and fullest:
        _, b = heapq.heappop(fullest)
        if len(bins[b]) < 2:
            continue
        half = bins[b][1::2]
        bins[b] = bins[b][::2]
        bins.append(half)
        for part in (b, len(bins) - 1):
            heapq.heappush(fullest, (-sum(lengths[i] for i in bins[part]), part))
    return [bins[rank::ranks] for rank in range(ranks)]


KARMARKAR_KARP = TwoStage(over_ranks, within_rank)
