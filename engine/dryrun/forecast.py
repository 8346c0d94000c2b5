"""Forecast a launch: memory of each pipeline rank, seconds of each phase, and, if it does not fit, settings that do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import Run
from engine.config.checks import warnings
from engine.dryrun import model_shapes
from engine.dryrun.hardware import Hardware
from engine.dryrun.memory import RankMemory, memory_of_ranks
from engine.dryrun.phases import HOST_BANDWIDTH, VERDICTS_PER_SECOND, Phase, one_time_phases, phases, seconds_of
from engine.dryrun.stages import simulate_stages as rehearse_every_rank
from engine.dryrun.suggest import settings_that_fit
from engine.dryrun.workload import Simulation, StageBuilder


@dataclass(frozen=True)
class Forecast:
    """Predicted memory and time of a launch."""

    simulation: Simulation
    stages: list[RankMemory]  # pipeline ranks that train
    generating: list[RankMemory]  # pipeline ranks that only generate
    phases: list[Phase]  # of one step
    once: list[Phase]  # one-time phases before the first step
    steps: int | None  # of the full run; None if the size of its dataset is unknown
    way_out: str | None  # settings that make it fit; None if it fits already, "" if none were found
    warnings: list[str]
    assumptions: list[str]

    @property
    def fits(self) -> bool:
        return all(rank.fits for rank in self.ranks)

    @property
    def ranks(self) -> list[RankMemory]:
        return [*self.stages, *self.generating]

    @property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.peak_bytes)

    @property
    def step_seconds(self) -> float:
        return seconds_of(self.phases)

    @property
    def tokens(self) -> int:
        """Predicted tokens of the sequences of one step, over all ranks."""
        return int(self.simulation.sequences.lengths_N.sum())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization of a step: FLOPs without padding and recomputation, divided by peak FLOPs of all devices in that time."""
        return sum(phase.flops for phase in self.phases) / (self.step_seconds * self.simulation.gpus * self.simulation.hardware.peak)

    @property
    def bubble(self) -> float:
        """Pipeline bubble: the share of the policy's optimizer step in which ranks are idle, in [0, 1]."""
        return self.simulation.policy.update.timeline.bubble

    @property
    def gpu_hours(self) -> float | None:
        """Of the full run; None if the number of steps is unknown."""
        if self.steps is None:
            return None
        return self.simulation.gpus * (sum(phase.seconds for phase in self.once) + self.steps * self.step_seconds) / 3600

    @property
    def energy_kwh(self) -> float | None:
        """Of the full run with all devices at full power; None if the power or the number of steps is unknown."""
        return self.gpu_hours * self.simulation.hardware.watts / 1000 if self.gpu_hours and self.simulation.hardware.watts else None


def forecast(
    run: Run,
    gpus: int,
    hardware: Hardware,
    *,
    given: Sequence[tuple[int, int]] = (),
    rehearse: StageBuilder = rehearse_every_rank,
    seek: bool = True,
) -> Forecast:
    """Forecast `run` on `gpus` devices of `hardware`.

    given     (prompt tokens, response tokens) of representative sequences; default: sampled from the distributions in lengths.py
    rehearse  simulates the stages of a model
    seek      whether to search for settings that fit if these do not

    Raises ValueError if the run cannot start; the message names the field, its value and a value that works.
    """
    simulation = Simulation.of(run, gpus, hardware, rehearse, given)
    ranks = memory_of_ranks(simulation)
    steps = run.steps or _steps(run)
    fits = all(rank.fits for rank in ranks)
    mean = float(simulation.sequences.lengths_N.mean())
    return Forecast(
        simulation=simulation,
        stages=[rank for rank in ranks if rank.trains],
        generating=[rank for rank in ranks if not rank.trains],
        phases=phases(simulation),
        once=one_time_phases(simulation, steps or 0),
        steps=steps,
        way_out=None if fits else settings_that_fit(simulation, given, rehearse) if seek else "",
        warnings=warnings(run, model_shapes.shape_of, simulation.policy.clock.world_size, node=hardware.node, tokens=mean),
        assumptions=_assumptions(simulation),
    )


def _steps(run: Run) -> int | None:
    """Number of steps, computed as the algorithm does; None if the size of the dataset is unknown."""
    rows, workload = model_shapes.dataset_rows(run.algorithm.sources), run.algorithm.workload()
    return None if rows is None else math.ceil(workload.passes * rows / workload.samples)


def _assumptions(simulation: Simulation) -> list[str]:
    workload, hardware = simulation.workload, simulation.hardware
    models = [simulation.run.model, *([workload.critic[0]] if workload.critic else [])]
    assumptions = [line for model in models if (line := model_shapes.guess_note(model))]
    assumptions.append(f"lengths: {simulation.sequences.source}")
    assumptions.append(
        f"{hardware.name}: {hardware.peak / 1e12:.3g} TFLOP/s, of which matrix products reach {hardware.gemm.ceiling:.0%} and attention "
        f"{hardware.attention:.0%}; {hardware.allowance / 1e9:.2g} GB per device reserved for non-tensor memory; source: hardware.toml, or "
        "the --device file"
    )
    if workload.generation is not None:
        assumptions.append(
            f"verification: {VERDICTS_PER_SECOND:.0f} responses/s, measured for `math` on two cores; further cores are not counted"
        )
    if workload.reference == "offloaded":
        assumptions.append(f"an offloaded reference is copied at {HOST_BANDWIDTH / 1e9:g} GB/s per GPU")
    assumptions.append(
        "not counted: data loading, batch construction, evaluation, checkpoints, stragglers, failures; power is the data sheet's"
    )
    return assumptions
