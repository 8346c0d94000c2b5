"""Search the fastest layouts of a recipe that fit in memory: all are estimated from composed stages, the best are simulated in full."""

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

BUDGETS = 5  # microbatch sizes tried: 2^n and 1.5 * 2^n tokens, starting with the smallest that holds the longest sequence
DEEPEST = 8  # largest number of virtual stages per pipeline rank
LOOKED_AT = 20  # the search ends after this number of layouts that fit, in order of their lower bound on time
ROOM = 0.9  # share of device memory that a layout may use; the rest is margin for the allocator and NCCL, whose use is estimated
RECOMPUTES = get_args(Recompute)  # in order of rising time and falling memory


@dataclass(frozen=True)
class Layout:
    """A layout that fits, with its predicted time and memory."""

    settings: list[str]  # command-line settings that differ from the recipe
    seconds: float  # of a step, estimated from composed stages
    memory: int  # bytes of the GPU with the highest peak, estimated from composed stages
    confirmed: Forecast | None = None  # full simulation

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
    """Find layouts of `run` that use at most ROOM of the memory of each of `gpus` devices, fastest first; empty if there are none.

    given     (prompt tokens, response tokens) of representative sequences; default: sampled from the distributions in lengths.py
    rehearse  simulates the stages of a model
    confirm   number of layouts to simulate in full; these come before all others

    Candidates are visited in order of a lower bound on the time of their optimizer steps. One that does not fit is tried again with more
    recomputation. The search ends after LOOKED_AT layouts that fit, whose phases are all estimated.
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
    """Return the first `count` layouts that still fit in a full simulation, then the layouts that were not simulated."""
    confirmed_layouts: list[Layout] = []
    remaining = list(ranked)
    while remaining and len(confirmed_layouts) < count:
        layout = remaining.pop(0)
        simulated = forecast(override(run, layout.settings), gpus, hardware, given=given, rehearse=rehearse, seek=False)
        if simulated.fullest.peak_bytes <= ROOM * hardware.memory:
            confirmed_layouts.append(replace(layout, confirmed=simulated))
    return sorted(confirmed_layouts, key=lambda layout: layout.step_seconds) + remaining


def _least(simulation: Simulation) -> float:
    """Lower bound in seconds on one optimizer step: the work of the slowest rank, plus the time until its first microbatch arrives."""
    policy = simulation.policy
    times = [sum(policy.clock.seconds(stage.forward) + policy.clock.seconds(stage.backward) for stage in rank) for rank in policy.ranks]
    before = (len(times) - 1) * min(times) / policy.parallel.vpp
    return policy.scaled(policy.update_batch.microbatches * max(times) + before)


def _candidates(run: Run, gpus: int, hardware: Hardware) -> Iterator[list[str]]:
    """Yield the settings of each layout, without recomputation; parallel.recompute is the last setting."""
    model = run.model.with_head(model_shapes.shape_of(run.model))
    generation = run.algorithm.workload().generation
    trainers = gpus - (generation.rollout.generator_gpus if generation else 0)
    for grid in _grids(model, run.parallel, trainers, hardware):
        stages = f"parallel.stages={list(grid.stages)}"
        ends = [f"parallel.count_{name}={str(on).lower()}" for name, on in (("embedding", grid.count_embedding), ("loss", grid.count_loss))]
        # vpp > 1 needs pp > 1, so pp is listed before vpp > 1 and after vpp = 1.
        depth = [f"parallel.pp={grid.pp}", f"parallel.vpp={grid.vpp}"]
        layout = [*(depth if grid.vpp > 1 else depth[::-1]), f"parallel.tp={grid.tp}", *ends, stages]
        for budget in _budgets(run, trainers):
            yield [*layout, f"tokens_per_microbatch={budget}", f"parallel.recompute={RECOMPUTES[0]}"]


def _grids(model: ModelShape, parallel: Parallel, gpus: int, hardware: Hardware) -> Iterator[Parallel]:
    """Yield grids whose weights, gradients and optimizer state fit in memory, each with the first valid split of layers over stages."""
    for tp in range(1, min(hardware.node, model.kv_heads) + 1):
        for pp in range(1, gpus // tp + 1):
            if gpus % (tp * pp) or hardware.node % tp:
                continue
            shares = gpus // (tp * pp) if parallel.distributed_optimizer else 1
            if model.parameters / (tp * pp) * (2 + 4 + 12 / shares) > hardware.memory:
                continue
            for vpp in range(1, DEEPEST + 1 if pp > 1 else 2):
                yield from _with_layer_split(model, replace(parallel, tp=tp, pp=pp, vpp=vpp, stages=()), gpus)


def _with_layer_split(model: ModelShape, grid: Parallel, gpus: int) -> Iterator[Parallel]:
    """Yield `grid` with the first of several splits of layers over stages that the model allows, if there is one."""
    plain = replace(grid, count_embedding=False, count_loss=False)
    explicit = replace(plain, stages=tuple(even_split(model.layers, grid.pp)) if grid.vpp == 1 else ())
    splits = [grid, replace(grid, count_embedding=True, count_loss=True), plain, explicit]
    yield from [split for split in splits if split.fits_model(model, gpus)][:1]


def _budgets(run: Run, gpus: int) -> list[int]:
    requirements: Requirements = run.algorithm.requirements(Launch(run, gpus, model_shapes.shape_of))
    longest = requirements.seqs_per_unit * requirements.longest_sequence.value
    sizes = sorted(size << i for i in range(longest.bit_length() + BUDGETS) for size in (2, 3))
    return [size for size in sizes if size >= longest][:BUDGETS]


def _differing(run: Run, settings: list[str]) -> list[str]:
    """Return the `settings` that are needed: without one of them the resulting run would be different."""
    target, needed = override(run, settings), settings
    for setting in settings:
        rest = [other for other in needed if other != setting]
        try:
            needed = rest if override(run, rest) == target else needed
        except ValueError:  # the others are only valid together with this one
            continue
    return needed


def table(layouts: list[Layout], run: Run) -> Table:
    """Table with one row per layout, fastest first. "GB": peak memory per GPU; "tokens": tokens per microbatch."""
    shown = Table("", "s/step", "GB", "MFU", "tp", "pp", "vpp", "recompute", "tokens", title="Fastest layouts that fit")
    for rank, layout in enumerate(layouts, start=1):
        candidate = override(run, layout.settings)
        p = candidate.parallel
        mfu = f"{layout.confirmed.mfu:.1%}" if layout.confirmed else ""
        cells = [layout.step_seconds, layout.peak_bytes / 1e9]
        grid = map(str, (p.tp, p.pp, p.vpp, p.recompute, candidate.tokens_per_microbatch))
        shown.add_row(f"{rank}{'' if layout.confirmed else ' (estimated)'}", *(f"{cell:.1f}" for cell in cells), mfu, *grid)
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
