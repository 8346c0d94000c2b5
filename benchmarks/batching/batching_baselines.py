"""The sequence planners of verl, TRL and axolotl, called as their own trainers call them, if they can be imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.batching.planners import Bins, Placement, Planner, TwoStage


def importable() -> list[tuple[str, int, Planner | TwoStage]]:
    """(name, the most sequences that it plans in reasonable time, planner) of each installed package."""
    return list(_importable())


def _importable() -> Iterator[tuple[str, int, Planner | TwoStage]]:
    for name, largest, module, make in (
        ("verl get_seqlen_balanced_partitions", 65_536, "verl.utils.seqlen_balancing", _verl),
        ("TRL _pack_bfd", 65_536, "trl.data_utils", _trl),
        ("axolotl pack_parallel", 10**9, "axolotl.utils.samplers.multipack", _axolotl),
    ):
        try:
            planner = make(import_module(module))
        except ImportError as error:
            print(f"{name}: skipped ({error})", file=sys.stderr)
            continue
        yield name, largest, planner


def _verl(module: Any) -> TwoStage:
    """Karmarkar-Karp. The last len % ranks sequences are dropped."""
    partition = module.get_seqlen_balanced_partitions

    def within(share: list[int], costs: Sequence[int], rounds: int) -> Bins:
        return [[share[i] for i in ids] for ids in partition([costs[i] for i in share], rounds, equal_size=False)]

    return TwoStage(lambda costs, ranks: partition(list(costs[: len(costs) // ranks * ranks]), ranks, equal_size=True), within)


def _trl(module: Any) -> Planner:
    """Best fit decreasing, for one rank. Its bins are distributed round-robin."""
    import pyarrow as pa

    def place(lengths: Sequence[int], costs: Sequence[int], ranks: int, budget: int) -> Placement:
        # One list per sequence, as long as the sequence and filled with its index: the packed values show where each sequence went.
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        indices = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        packed = module._pack_bfd(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, indices)}), budget)
        column = packed["input_ids"].combine_chunks()
        bounds, values = column.offsets.to_numpy(), column.values.to_numpy()
        bins = [np.unique(values[start:end]).tolist() for start, end in pairwise(bounds)]
        return [bins[rank::ranks] for rank in range(ranks)]

    return place


def _axolotl(module: Any) -> Planner:
    """First fit in order of arrival, compiled. Bins beyond a multiple of the ranks are dropped."""

    def place(lengths: Sequence[int], costs: Sequence[int], ranks: int, budget: int) -> Placement:
        bins = module.pack_parallel(np.asarray(lengths), bin_capacity=budget, group_size=100_000, bin_size=200, num_processes=1)
        return [bins[rank : len(bins) // ranks * ranks : ranks] for rank in range(ranks)]

    return place
