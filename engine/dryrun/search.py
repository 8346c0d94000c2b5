"""The fastest layouts of a recipe that fit: priced from parts, the best of them rehearsed whole."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, get_args

from rich.table import Table

from engine.config import ModelShape, Parallel, Recompute, Run, even_split, override
from engine.config.checks import Launch, Requirements
from engine.dryrun import model_shapes
from engine.dryrun.compose import composer
from engine.dryrun.forecast import Forecast, forecast
from engine.dryrun.hardware import Hardware
from engine.dryrun.memory import memory_of_ranks
from engine.dryrun.phases import phases, seconds_of
from engine.dryrun.stages import simulate_stages as rehearse_every_rank
from engine.dryrun.workload import Simulation, StageBuilder

BUDGETS = 5  # sizes of a microbatch that are tried: powers of two and one and a half times such, from the least that holds the longest
DEEPEST = 8  # virtual stages of a pipeline rank
LOOKED_AT = 20  # layouts that fit, in order of the least time they can take, before the search ends
ROOM = 0.9  # of a device's memory: what a layout may fill, for the allocator and NCCL are only guessed at
RECOMPUTES = get_args(Recompute)  # each slower than the one before, and smaller


@dataclass(frozen=True)
class Layout:
    """One answer."""

    settings: list[str]  # what differs from the recipe, to be given behind it
    seconds: float  # of a step, priced from parts
    memory: int  # bytes, of the fullest GPU
    confirmed: Forecast | None = None  # rehearsed whole

    @property
    def step_seconds(self) -> float:
        return self.confirmed.step_seconds if self.confirmed else self.seconds

    @property
    def peak_bytes(self) -> int:
        return self.confirmed.fullest.peak_bytes if self.confirmed else self.memory


def search(
    run: Run,
    gpus: int,
    hardware: Hardware,
    *,
    given: Sequence[tuple[int, int]] = (),
    rehearse: StageBuilder = rehearse_every_rank,
    confirm: int = 3,
) -> list[Layout]:
    """Layouts of `run` that fill at most ROOM of each of `gpus` of `hardware`, the fastest first; the first `confirm` are rehearsed whole,
    and are ahead of all others. Empty where none does.

    Candidates are met in order of the least time that an optimizer step can take, those that are too large again with more recomputed;
    LOOKED_AT that fit are timed with all their phases.
    """
    composed = composer(rehearse)
    waiting: list[tuple[float, int, list[str], Simulation]] = []

    def consider(settings: list[str]) -> None:
        with suppress(ValueError):  # such a run cannot start
            simulation = Simulation.of(override(run, settings), gpus, hardware, composed, given)
            heapq.heappush(waiting, (_least(simulation), len(waiting), settings, simulation))

    for settings in _candidates(run, gpus, hardware):
        consider(settings)
    fitting: list[Layout] = []
    while waiting and len(fitting) < LOOKED_AT:
        _, _, settings, simulation = heapq.heappop(waiting)
        memory = max(rank.peak_bytes for rank in memory_of_ranks(simulation))
        if memory <= ROOM * hardware.memory:
            fitting.append(Layout(_differing(run, settings), seconds_of(phases(simulation)), memory))
        elif harder := RECOMPUTES[RECOMPUTES.index(simulation.run.parallel.recompute) + 1 :]:
            consider([*settings[:-1], f"parallel.recompute={harder[0]}"])
    ranked = sorted(fitting, key=lambda layout: layout.seconds)
    return _confirmed(ranked, run, gpus, hardware, given, rehearse, confirm)


def _confirmed(
    ranked: list[Layout], run: Run, gpus: int, hardware: Hardware, given: Any, rehearse: StageBuilder, count: int
) -> list[Layout]:
    """The first `count` that still fit when they are rehearsed whole, then those that nobody rehearsed."""
    whole: list[Layout] = []
    left = list(ranked)
    while left and len(whole) < count:
        layout = left.pop(0)
        found = forecast(override(run, layout.settings), gpus, hardware, given=given, rehearse=rehearse, seek=False)
        if found.fullest.peak_bytes <= ROOM * hardware.memory:
            whole.append(replace(layout, confirmed=found))
    return sorted(whole, key=lambda layout: layout.step_seconds) + left


def _least(simulation: Simulation) -> float:
    """Seconds that all optimizer steps of one step of the recipe take at least: the slowest rank's work, after it has come to it."""
    policy = simulation.policy
    times = [sum(policy.clock.seconds(stage.forward) + policy.clock.seconds(stage.backward) for stage in rank) for rank in policy.ranks]
    before = (len(times) - 1) * min(times) / policy.parallel.vpp
    return policy.scaled(policy.update_batch.microbatches * max(times) + before)


def _candidates(run: Run, gpus: int, hardware: Hardware) -> Iterator[list[str]]:
    """Every layout without recomputation, which is the last of its settings."""
    model = run.model.with_head(model_shapes.shape_of(run.model))
    generation = run.algorithm.workload().generation
    trainers = gpus - (generation.rollout.generator_gpus if generation else 0)
    for grid in _grids(model, run.parallel, trainers, hardware):
        dealt = f"parallel.stages={list(grid.stages)}"
        ends = [f"parallel.count_{name}={str(on).lower()}" for name, on in (("embedding", grid.count_embedding), ("loss", grid.count_loss))]
        depth = [f"parallel.pp={grid.pp}", f"parallel.vpp={grid.vpp}"]  # virtual stages need a pipeline: they come after it and go before
        layout = [*(depth if grid.vpp > 1 else depth[::-1]), f"parallel.tp={grid.tp}", *ends, dealt]
        for budget in _budgets(run, trainers):
            yield [*layout, f"tokens_per_microbatch={budget}", f"parallel.recompute={RECOMPUTES[0]}"]


def _grids(model: ModelShape, parallel: Parallel, gpus: int, hardware: Hardware) -> Iterator[Parallel]:
    """Those whose weights, gradients and optimizer alone would not be too much, each with the first way to deal layers that holds."""
    for tp in range(1, min(hardware.node, model.kv_heads) + 1):
        for pp in range(1, gpus // tp + 1):
            if gpus % (tp * pp) or hardware.node % tp:
                continue
            shares = gpus // (tp * pp) if parallel.distributed_optimizer else 1
            if model.parameters / (tp * pp) * (2 + 4 + 12 / shares) > hardware.memory:
                continue
            for vpp in range(1, DEEPEST + 1 if pp > 1 else 2):
                yield from _dealt(model, replace(parallel, tp=tp, pp=pp, vpp=vpp, stages=()), gpus)


def _dealt(model: ModelShape, grid: Parallel, gpus: int) -> Iterator[Parallel]:
    plain = replace(grid, count_embedding=False, count_loss=False)
    by_hand = replace(plain, stages=tuple(even_split(model.layers, grid.pp)) if grid.vpp == 1 else ())
    ways = [grid, replace(grid, count_embedding=True, count_loss=True), plain, by_hand]
    yield from [way for way in ways if way.fits_model(model, gpus)][:1]


def _budgets(run: Run, gpus: int) -> list[int]:
    requirements: Requirements = run.algorithm.requirements(Launch(run, gpus, model_shapes.shape_of))
    longest = requirements.seqs_per_unit * requirements.longest_sequence.value
    sizes = sorted(size << i for i in range(longest.bit_length() + BUDGETS) for size in (2, 3))
    return [size for size in sizes if size >= longest][:BUDGETS]


def _differing(run: Run, settings: list[str]) -> list[str]:
    """Of `settings` those without which `run` would not become the same."""
    whole, kept = override(run, settings), settings
    for setting in settings:
        rest = [other for other in kept if other != setting]
        try:
            kept = rest if override(run, rest) == whole else kept
        except ValueError:  # it makes way for others
            continue
    return kept


def table(layouts: list[Layout], run: Run) -> Table:
    """A row for each layout, the fastest first."""
    shown = Table("", "s a step", "GB", "MFU", "tp", "pp", "vpp", "recompute", "tokens", title="the fastest layouts that fit")
    for place, layout in enumerate(layouts, start=1):
        asked = override(run, layout.settings)
        p = asked.parallel
        mfu = f"{layout.confirmed.mfu:.1%}" if layout.confirmed else ""
        cells = [layout.step_seconds, layout.peak_bytes / 1e9]
        grid = map(str, (p.tp, p.pp, p.vpp, p.recompute, asked.tokens_per_microbatch))
        shown.add_row(f"{place}{'' if layout.confirmed else ' (from parts)'}", *(f"{cell:.1f}" for cell in cells), mfu, *grid)
    return shown


def as_json(layouts: list[Layout]) -> list[dict[str, Any]]:
    return [
        {
            "settings": layout.settings,
            "step_seconds": layout.step_seconds,
            "peak_bytes": layout.peak_bytes,
            "mfu": layout.confirmed.mfu if layout.confirmed else None,
            "rehearsed": layout.confirmed is not None,
        }
        for layout in layouts
    ]
