"""The dry run's report: tables on the console, JSON, and a PNG of the pipeline schedule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from engine.dryrun.clock import CostModel
from engine.dryrun.forecast import Forecast
from engine.dryrun.memory import RankMemory
from engine.dryrun.phases import GENERATION, Phase
from engine.dryrun.schedule import TimedOp
from engine.dryrun.workload import TrainedModel

COLUMNS = ("weights", "gradients", "optimizer", "activations", "batch", "cache", "reference", "critic", "context")
COLOURS = ("#4477aa", "#cc6677")  # forward, backward; virtual stages differ in shade


def print_report(forecast: Forecast, console: Console) -> None:
    """Print memory per pipeline stage, time per phase, batch statistics, the verdict, warnings and assumptions."""
    memory = [memory_table(forecast.stages, "Predicted peak memory per GPU (GB)")]
    if forecast.generating:
        memory.append(memory_table(forecast.generating, "Predicted peak memory per generator GPU (GB)"))
    console.print(Group(Text(_headline(forecast), style="bold"), *memory, phase_table(forecast), *_lines(forecast)))


def _headline(forecast: Forecast) -> str:
    simulation, parallel = forecast.simulation, forecast.simulation.run.parallel
    virtual = f" x {parallel.vpp} virtual stages" if parallel.vpp > 1 else ""
    grid = f"tp{parallel.tp} pp{parallel.pp}{virtual} dp{simulation.dp}"
    kind = type(simulation.run.algorithm).__name__
    generators = f", generators dp{simulation.generator.dp}" if simulation.generator else ""
    size = f"{simulation.policy.model.parameters / 1e9:.1f}B parameters"
    return f"{kind} of {size} on {simulation.gpus} x {simulation.hardware.name}, {grid}{generators}"


def memory_table(ranks: list[RankMemory], title: str) -> Table:
    """One row per group of consecutive pipeline ranks with equal memory. Sizes in GB per GPU."""
    used = [name for name in COLUMNS if any(name in rank.parts for rank in ranks)]
    table = Table("stage", "layers", "params", *used, "peak", "capacity", "peak phase", title=title)
    for column in table.columns[1:-1]:
        column.justify = "right"
    for first, last, rank in _alike(ranks):
        parts = [f"{rank.parts[name] / 1e9:.1f}" if name in rank.parts else "" for name in used]
        peak = Text(f"{rank.peak_bytes / 1e9:.1f}", style="" if rank.fits else "bold red")
        name = str(first) if first == last else f"{first}-{last}"
        capacity = f"{rank.capacity / 1e9:.0f}"
        table.add_row(name, str(rank.layers), f"{rank.params / 1e9:.2f}B", *parts, peak, capacity, rank.moment)
    return table


def _alike(stages: list[RankMemory]) -> Iterator[tuple[int, int, RankMemory]]:
    """Yield (first rank, last rank, memory) per group of consecutive ranks with the same displayed numbers."""
    start = 0
    for i, rank in enumerate(stages):
        following = stages[i + 1] if i + 1 < len(stages) else None
        if following is None or _shown(following) != _shown(rank):
            yield start, i, rank
            start = i + 1


def _shown(rank: RankMemory) -> tuple[Any, ...]:
    return rank.layers, rank.moment, {name: round(size / 1e8) for name, size in rank.parts.items()}


def phase_table(forecast: Forecast) -> Table:
    """Predicted time per phase of a step. Phases in parentheses run concurrently, on generator GPUs, and do not add to the step time."""
    table = Table("phase", "seconds", "share", "MFU", title="Predicted time per step")
    for column in table.columns[1:]:
        column.justify = "right"
    devices = forecast.simulation.gpus * forecast.simulation.hardware.peak
    whole = Phase("step", forecast.step_seconds, forecast.mfu * forecast.step_seconds * devices)
    for name, seconds, flops, concurrent in [*forecast.phases, whole]:
        useful = f"{flops / seconds / devices:.1%}" if flops and seconds else ""
        cells = (f"{seconds:.2f}", f"{seconds / forecast.step_seconds:.1%}")
        table.add_row(name, *(f"({cell})" if concurrent else cell for cell in cells), useful)
    return table


def _lines(forecast: Forecast) -> Iterator[Text]:
    yield Text(f"{forecast.tokens:,} tokens/step, {forecast.tokens_per_second:,.0f} tokens/s, pipeline bubble {forecast.bubble:.1%}")
    for trained in forecast.simulation.models:
        yield Text(f"{trained.name}: {_batch_line(trained)}")
    if generator := forecast.simulation.generator:
        generation_seconds = sum(phase.seconds for phase in forecast.phases if phase.name in GENERATION)
        yield Text(f"{generator.world_size} generator GPUs, idle {1 - generation_seconds / forecast.step_seconds:.0%} of each step")
    for phase in forecast.once:
        yield Text(f"one-time cost: {phase.name}, {phase.seconds / 3600:,.1f} hours")
    if forecast.gpu_hours is not None:
        energy = f", {forecast.energy_kwh:,.0f} kWh" if forecast.energy_kwh else ""
        yield Text(f"full run: {forecast.steps:,} steps, {forecast.gpu_hours:,.1f} GPU-hours{energy}")
    yield Text(verdict(forecast), style="green" if forecast.fits else "bold red")
    yield from (Text(f"warning: {line}", style="yellow") for line in forecast.warnings)
    yield from (Text(f"assumption: {line}", style="dim") for line in forecast.assumptions)


def _batch_line(trained: TrainedModel) -> str:
    plan = trained.update_batch
    return f"{plan.microbatches} microbatches per replica, {plan.fill:.1%} full, load imbalance (max/mean) {plan.imbalance:.3f}"


def verdict(forecast: Forecast) -> str:
    """Whether the launch fits in memory; if not, the fullest stage and settings that fit."""
    fullest = forecast.fullest
    name = f"stage {fullest.pp}" if fullest.trains else f"stage {fullest.pp} of the generators"
    need = f"{name} needs {fullest.peak_bytes / 1e9:.1f} GB of {fullest.capacity / 1e9:.0f} GB ({fullest.moment})"
    if forecast.fits:
        return f"it fits: {need}"
    return f"it does not fit: {need}; " + (f"this fits: {forecast.way_out}" if forecast.way_out else "none of the settings tried fits")


def as_json(forecast: Forecast) -> dict[str, Any]:
    """The report as JSON values, in bytes and seconds; `stages` are pipeline ranks. Phases listed in `beside` run concurrently, on
    generator GPUs; the step time is the sum of all other phases."""
    simulation = forecast.simulation
    return {
        "ranks": simulation.gpus,
        "device": simulation.hardware.name,
        "grid": {
            "tp": simulation.run.parallel.tp,
            "pp": simulation.run.parallel.pp,
            "vpp": simulation.run.parallel.vpp,
            "dp": simulation.dp,
        },
        "generating": _generating(forecast, simulation.generator) if simulation.generator else None,
        "fits": forecast.fits,
        "way_out": forecast.way_out,
        "stages": [_stage(rank) for rank in forecast.stages],
        "step_seconds": forecast.step_seconds,
        "phases": {phase.name: phase.seconds for phase in forecast.phases},
        "beside": [phase.name for phase in forecast.phases if phase.concurrent],
        "once": {phase.name: phase.seconds for phase in forecast.once},
        "mfu": forecast.mfu,
        "tokens_per_second": forecast.tokens_per_second,
        "bubble": forecast.bubble,
        "batch": _batch(simulation.policy) | {"tokens": forecast.tokens},
        "critic_batch": None if simulation.critic is None else _batch(simulation.critic),
        "recipe": {"steps": forecast.steps, "gpu_hours": forecast.gpu_hours, "energy_kwh": forecast.energy_kwh},
        "warnings": forecast.warnings,
        "assumptions": forecast.assumptions,
    }


def _generating(forecast: Forecast, grid: CostModel) -> dict[str, Any]:
    return {"ranks": grid.world_size, "dp": grid.dp, "stages": [_stage(rank) for rank in forecast.generating]}


def _stage(rank: RankMemory) -> dict[str, Any]:
    sizes = {"pp": rank.pp, "layers": rank.layers, "params": rank.params, "peak_bytes": rank.peak_bytes, "fits": rank.fits}
    return sizes | {"moment": rank.moment, "bytes": rank.parts, "moments": rank.moments}


def _batch(trained: TrainedModel) -> dict[str, Any]:
    plan = trained.update_batch
    return {"fill": plan.fill, "imbalance": plan.imbalance, "microbatches": plan.microbatches}


def draw_pipeline(forecast: Forecast, path: Path) -> None:
    """Write a PNG of the policy's pipeline schedule in one optimizer step: pipeline ranks on the y axis, seconds on the x axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # optional dependency
    from matplotlib.figure import Figure

    timeline, parallel = forecast.simulation.policy.update.timeline, forecast.simulation.run.parallel
    figure = Figure(figsize=(14, 1.5 + 0.3 * parallel.pp), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for rank, ops in enumerate(timeline.ranks):
        for kind, colour in zip(("forward", "backward"), COLOURS, strict=True):
            for chunk in range(parallel.vpp):
                bars = [_bar(op) for op in ops if (op.piece.kind, op.piece.chunk) == (kind, chunk)]
                named = f"{kind}s" if rank == chunk == 0 else None
                shade = 1 - 0.6 * chunk / parallel.vpp
                axes.broken_barh(bars, (rank - 0.4, 0.8), facecolors=colour, alpha=shade, edgecolors="white", linewidth=0.2, label=named)
    axes.set(xlabel="seconds", ylabel="pipeline stage", yticks=range(parallel.pp), xlim=(0, timeline.seconds))
    axes.invert_yaxis()
    axes.legend(loc="upper right", ncols=2)
    axes.set_title(f"{_headline(forecast)}: one optimizer step, {timeline.seconds:.1f} s, bubble {timeline.bubble:.1%}", fontsize=10)
    figure.savefig(path, dpi=120)


def _bar(op: TimedOp) -> tuple[float, float]:
    return op.start, op.end - op.start
