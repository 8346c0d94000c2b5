"""python -m benchmarks batching: Time planning and building of microbatches, compared with published algorithms and memcpy.

Lengths are lognormal(6.72, 0.9) clipped to [32, 8192], seed 0; a sequence of L tokens costs 24576 L + L^2.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.batching import batching_baselines, planners
from benchmarks.batching.planners import Placement, PlacementStats
from benchmarks.kernels.bench_kernels import table
from benchmarks.support.timing import Spread, environment, rotated
from engine.batching.build import build
from engine.batching.plan import Plan, plan
from engine.batching.ragged import Arena, Ragged

COST = (0, 24576, 1)
PROMPT = 100  # tokens at the start of each sequence without loss
ENOUGH_SECONDS = 20.0  # time limit of a contender on one problem, over all rounds
PYTHON = "plain Python: "
NOTES = (
    "Times are median (min..max) over rounds, in milliseconds of wall time, with garbage collection off. Every round starts with another",
    "contender, and ratios are computed within a round. The heap is warm, as it is in training. Plain Python contenders are the published",
    "algorithms, reimplemented on lists (benchmarks/batching/planners.py). Karmarkar-Karp is timed as it is used: one process balances the",
    "ranks, then one rank its microbatches. Fill is tokens / (ranks x microbatches x budget). Imbalance is the cost of the most loaded",
    "rank over the mean. Lockstep is the same if ranks wait for each other after every microbatch.",
)

T = TypeVar("T")
ToPlacement = Callable[[], Placement]  # converts a contender's result into a placement; not timed


@dataclass(frozen=True)
class Problem:
    count: int
    ranks: int
    budget: int

    def __str__(self) -> str:
        return f"{self.count:,} sequences, {self.ranks} ranks, {self.budget:,} tokens per microbatch"


# (problem, lengths as array, lengths as list, costs) -> (seconds, placement)
Place = Callable[[Problem, np.ndarray, list[int], list[int]], tuple[float, ToPlacement]]


@dataclass(frozen=True)
class Contender:
    name: str
    largest: int  # the most sequences that it plans within the time of a benchmark
    place: Place


@dataclass(frozen=True)
class Line:
    """The times of one contender on one problem, by round. Building has no placement, so `stats` is None."""

    who: str
    seconds: list[float]
    stats: PlacementStats | None = None


PROBLEMS = (Problem(4096, 240, 16384), Problem(4096, 240, 8192), Problem(65_536, 240, 16384), Problem(1_000_000, 240, 16384))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", action="store_true", help="also measure the planners of verl, TRL and axolotl, if they can be imported")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="number of rounds (default: 7)")
    parser.add_argument("--json", type=Path, metavar="F", help="also write all results to this JSON file")


def main(arguments: argparse.Namespace) -> int:
    """Print the report as Markdown."""
    facts = {**environment(), "command": "python -m benchmarks batching" + " --peers" * arguments.peers + f" --rounds {arguments.rounds}"}
    others = (
        [Contender(name, largest, placer(place)) for name, largest, place in batching_baselines.importable()] if arguments.peers else []
    )
    built = {count: measure_build(count, arguments.rounds) for count in (4096, 65_536)}  # first: it warms the heap
    placed = {problem: place(problem, [*CONTENDERS, *others], arguments.rounds) for problem in PROBLEMS}
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(as_json(placed, built, facts), indent=1) + "\n")
    print(page(placed, built, facts))
    return 0


def lengths_of(count: int) -> np.ndarray:
    return np.clip(np.random.default_rng(0).lognormal(6.72, 0.9, count), 32, 8192).astype(np.int64)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    gc.collect()
    gc.disable()
    began = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    gc.enable()
    return seconds, result


def place(problem: Problem, contenders: Sequence[Contender], rounds: int) -> list[Line]:
    """Times every contender that can solve `problem`, round by round, until its time limit."""
    lengths_N = lengths_of(problem.count)
    lengths, costs = lengths_N.tolist(), (COST[1] * lengths_N + COST[2] * lengths_N**2).tolist()
    capable = [contender for contender in contenders if contender.largest >= problem.count]
    seconds: dict[str, list[float]] = {contender.name: [] for contender in capable}
    stats: dict[str, PlacementStats] = {}
    for round_ in range(rounds):
        for contender in rotated(capable, round_):
            if sum(seconds[contender.name]) > ENOUGH_SECONDS:
                continue
            elapsed, to_placement = contender.place(problem, lengths_N, lengths, costs)
            seconds[contender.name].append(elapsed)
            if contender.name not in stats:
                stats[contender.name] = planners.placement_stats(to_placement(), lengths, costs, problem.budget)
    return [Line(contender.name, seconds[contender.name], stats[contender.name]) for contender in capable]


def place_ours(problem: Problem, lengths_N: np.ndarray, lengths: list[int], costs: list[int]) -> tuple[float, ToPlacement]:
    seconds, planned = timed(lambda: plan(lengths_N, problem.ranks, problem.budget, cost=COST))
    return seconds, lambda: placement_of(planned)


def placement_of(planned: Plan) -> Placement:
    return [[planned.sequences(rank, j).tolist() for j in range(planned.microbatches)] for rank in range(planned.ranks)]


def placer(planner: planners.Planner | planners.TwoStage) -> Place:
    return two_stage_placer(planner) if isinstance(planner, planners.TwoStage) else planner_placer(planner)


def planner_placer(planner: planners.Planner) -> Place:
    def place(problem: Problem, lengths_N: np.ndarray, lengths: list[int], costs: list[int]) -> tuple[float, ToPlacement]:
        seconds, placement = timed(lambda: planner(lengths, costs, problem.ranks, problem.budget))
        return seconds, lambda: placement

    return place


def two_stage_placer(stages: planners.TwoStage) -> Place:
    """Times the first stage, and the second stage of one rank."""

    def place(problem: Problem, lengths_N: np.ndarray, lengths: list[int], costs: list[int]) -> tuple[float, ToPlacement]:
        over, shares = timed(lambda: stages.over(costs, problem.ranks))
        rounds = planners.rounds_needed(shares, lengths, problem.budget)
        within, _ = timed(lambda: stages.within(shares[0], costs, rounds))
        return over + within, lambda: [stages.within(share, costs, rounds) for share in shares]

    return place


KARMARKAR_KARP = PYTHON + "Karmarkar-Karp"
CONTENDERS = (
    Contender("engine.batching.plan.plan", 10**9, place_ours),
    Contender(KARMARKAR_KARP, 65_536, placer(planners.KARMARKAR_KARP)),
    Contender(PYTHON + "first fit decreasing", 65_536, placer(planners.first_fit_decreasing)),
    Contender(PYTHON + "modified first fit decreasing", 65_536, placer(planners.modified_first_fit_decreasing)),
    Contender(PYTHON + "next fit", 10**9, placer(planners.next_fit)),
)


MEMCPY = "memcpy of all that is built, 1 thread"
ALONE, TOGETHER = "build all as one rank, 1 thread", "build all as one rank, threads=0"
IN_TURN = "build all, 240 ranks in turn"
SHARE, COLD_SHARE = "build the share of 1 rank of 240, mean of all in turn", "build the share of 1 rank of 240, once, caches cold"
LISTS = "from Python lists: flatten, plan, build all as one rank"


def measure_build(count: int, rounds: int) -> list[Line]:
    """Times building `count` sequences in several ways, and copying as many bytes with one thread."""
    ragged = rollouts(count)
    sharded, single = (plan(ragged.lengths, ranks, 16384, cost=COST) for ranks in (240, 1))
    arena, full, target = Arena(), Arena(), Arena()
    build(single, 0, ragged, full)
    copies = [(target.take(name, t.dtype, len(t)).numpy(), t.numpy()) for name, t in flat_of(full, int(single.totals.sum())).items()]
    work: dict[str, Callable[[], Any]] = {
        MEMCPY: lambda: [np.copyto(to, source) for to, source in copies],
        ALONE: lambda: build(single, 0, ragged, full, threads=1),
        TOGETHER: lambda: build(single, 0, ragged, full),
        IN_TURN: lambda: [build(sharded, rank, ragged, arena) for rank in range(240)],
        COLD_SHARE: lambda: build(sharded, 0, ragged, arena),
    }
    if count <= 4096:
        lists = as_lists(ragged)
        work[LISTS] = lambda: build_lists(lists, full)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for run in work.values():  # warm-up: touches all memory
        run()
    for round_ in range(rounds):
        for name in rotated(list(work), round_):
            seconds[name].append(timed(work[name])[0])
    seconds[SHARE] = [turn / 240 for turn in seconds[IN_TURN]]
    return [Line(name, times) for name, times in seconds.items()]


def rollouts(count: int) -> Ragged:
    """Rollouts: tokens, mask, a log-prob per token and an advantage per sequence. Built, they take 21 bytes per token."""
    rng, lengths_N = np.random.default_rng(0), lengths_of(count)
    total = int(lengths_N.sum())
    return Ragged(
        tokens=rng.integers(0, 128_000, total + count, dtype=np.int32),
        offsets=np.concatenate(([0], np.cumsum(lengths_N + 1))),
        mask=np.concatenate([np.arange(length) >= PROMPT for length in lengths_N]).astype(np.uint8),
        per_token={"old_logprob": rng.random(total, dtype=np.float32)},
        per_sequence={"advantage": rng.random(count, dtype=np.float32)},
    )


def flat_of(arena: Arena, size: int) -> dict[str, torch.Tensor]:
    """The first `size` entries of every buffer."""
    ids = dict.fromkeys(("tokens_out", "targets_out", "positions_out"), torch.int32)
    kinds = {**ids, "mask_out": torch.uint8, **dict.fromkeys(("old_logprob", "advantage"), torch.float32)}
    return {name: arena.take(name, kind, size) for name, kind in kinds.items()}


def as_lists(ragged: Ragged) -> tuple[list[Any], ...]:
    bounds = ragged.offsets[1:-1]
    mask_bounds = bounds - np.arange(1, len(bounds) + 1)
    fields = ((ragged.tokens, bounds), (ragged.mask, mask_bounds), (ragged.per_token["old_logprob"], mask_bounds))
    return (*([row.tolist() for row in np.split(values, splits)] for values, splits in fields), ragged.per_sequence["advantage"].tolist())


def build_lists(lists: tuple[list[Any], ...], arena: Arena) -> None:
    tokens, mask, old_logprob, advantage = lists
    ragged = Ragged.of(tokens, mask, {"old_logprob": old_logprob}, {"advantage": advantage})
    build(plan(ragged.lengths, 1, 16384, cost=COST), 0, ragged, arena)


def as_json(placed: dict[Problem, list[Line]], built: dict[int, list[Line]], facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "facts": facts,
        "placed": [{"problem": asdict(problem), "lines": [asdict(line) for line in lines]} for problem, lines in placed.items()],
        "built": [{"count": count, "lines": [asdict(line) for line in lines]} for count, lines in built.items()],
    }


def page(placed: dict[Problem, list[Line]], built: dict[int, list[Line]], facts: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# Batching on CPU: placing sequences and building tensors", "", (__doc__ or "").split("\n\n")[1].strip(), *NOTES]
    for problem, contenders in placed.items():
        lines += ["", f"## Plan: {problem}", "", *table(PLACED, [placed_row(line, contenders[0]) for line in contenders])]
    for count, ways in built.items():
        tokens = int(lengths_of(count).sum())
        header = ("", "ms", "ns per token", "/ memcpy")
        lines += ["", f"## Build: {count:,} sequences, {tokens:,} tokens, 21 bytes each", "", *table(header, built_rows(ways, tokens))]
    machine = [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join([*lines, "", "## Targets", "", *targets(placed, built), "", "## Environment", "", *machine])


PLACED = ("contender", "ms", "rounds", "/ ours", "microbatches", "fill", "imbalance", "lockstep", "dropped", "over budget")


def stats_of(line: Line) -> PlacementStats:
    assert line.stats is not None
    return line.stats


def placed_row(line: Line, ours: Line) -> list[str]:
    stats = stats_of(line)
    quality = [str(stats.microbatches), f"{stats.fill:.4f}", f"{stats.imbalance:.5f}", f"{stats.lockstep:.5f}", f"{stats.dropped:.1%}"]
    return [line.who, milliseconds(line).text(3), str(len(line.seconds)), ratio(line, ours).text(1), *quality, str(stats.over)]


def built_rows(lines: Sequence[Line], tokens: int) -> list[list[str]]:
    def row(line: Line) -> list[str]:
        if line.who in (SHARE, COLD_SHARE):
            return [line.who, milliseconds(line).text(3), "", ""]
        return [line.who, milliseconds(line).text(3), f"{milliseconds(line).median * 1e6 / tokens:.2f}", ratio(line, lines[0]).text(2)]

    return [row(line) for line in lines]


def milliseconds(line: Line) -> Spread:
    return Spread.of([1e3 * seconds for seconds in line.seconds])


def ratio(line: Line, base: Line) -> Spread:
    return Spread.of([a / b for a, b in zip(line.seconds, base.seconds, strict=False)])


def targets(placed: dict[Problem, list[Line]], built: dict[int, list[Line]]) -> list[str]:
    """A line per design target: the measured value, and whether it is met."""
    small, narrow, large, huge = (placed[problem][0] for problem in PROBLEMS)
    slower = [line for line in placed[PROBLEMS[2]] if line.who == KARMARKAR_KARP or line.who.startswith("verl")]
    at_65536, at_4096 = ({line.who: line for line in built[count]} for count in (65_536, 4096))
    return [
        verdict("plan 65,536, ms", milliseconds(large).median, 5),
        verdict("plan 1,000,000, ms", milliseconds(huge).median, 100),
        verdict("plan 4,096, ms", milliseconds(small).median, 0.5),
        *(verdict(f"plan 65,536, times as fast as {line.who}", ratio(line, large).median, 100, at_least=True) for line in slower),
        verdict("65,536/240/16,384: imbalance", stats_of(large).imbalance, 1.001),
        verdict("65,536/240/16,384: lockstep", stats_of(large).lockstep, 1.005),
        verdict("4,096/240/16,384: imbalance", stats_of(small).imbalance, 1.005),
        verdict("4,096/240/16,384: lockstep", stats_of(small).lockstep, 1.005),
        verdict("4,096/240/8,192: lockstep", stats_of(narrow).lockstep, 1.06),
        *(verdict(f"65,536: {who}, / memcpy", ratio(at_65536[who], at_65536[MEMCPY]).median, 1.5) for who in (ALONE, TOGETHER, IN_TURN)),
        *(verdict(f"65,536: {who}, ms", milliseconds(at_65536[who]).median, 1) for who in (SHARE, COLD_SHARE)),
        verdict(f"4,096: {LISTS}, ms", milliseconds(at_4096[LISTS]).median, 60),
    ]


def verdict(what: str, value: float, target: float, at_least: bool = False) -> str:
    met = value >= target if at_least else value <= target
    return f"- {what}: {value:.5g}, target {'>=' if at_least else '<='} {target:g}: {'met' if met else 'MISSED'}"
