"""From a recipe to a forecast: memory of every pipeline rank, seconds of every phase, and what would make it fit."""

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
    """What a launch will be like."""

    simulation: Simulation
    stages: list[RankMemory]  # that train
    generating: list[RankMemory]  # that only generate
    phases: list[Phase]  # of one step
    once: list[Phase]  # before the first
    steps: int | None  # of the whole recipe; None where the size of its data is not known
    way_out: str | None  # settings that make it fit; None where it fits, "" where none was found
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
        """Of the whole step: floating-point operations that the model's mathematics asks for, over what the devices could do."""
        return sum(phase.flops for phase in self.phases) / (self.step_seconds * self.simulation.gpus * self.simulation.hardware.peak)

    @property
    def bubble(self) -> float:
        """The share of an optimizer step of the policy in which a pipeline rank waits."""
        return self.simulation.policy.update.timeline.bubble

    @property
    def gpu_hours(self) -> float | None:
        """Of the whole recipe."""
        if self.steps is None:
            return None
        return self.simulation.gpus * (sum(phase.seconds for phase in self.once) + self.steps * self.step_seconds) / 3600

    @property
    def energy_kwh(self) -> float | None:
        """Of the devices at full power, for the whole recipe; None where that power is not known."""
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
    """What `run` will be like on `gpus` of `hardware`.

    given   tokens of (prompt, response) of sequences like those to come; none: drawn from lengths.py's distributions
    seek    whether settings are sought that fit, where these do not

    Raises ValueError where the run cannot start, with the field, its value and one that works.
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
    """As the algorithm itself counts them."""
    rows, workload = model_shapes.dataset_rows(run.algorithm.sources), run.algorithm.workload()
    return None if rows is None else math.ceil(workload.passes * rows / workload.samples)


def _assumptions(simulation: Simulation) -> list[str]:
    workload, hardware = simulation.workload, simulation.hardware
    models = [simulation.run.model, *([workload.critic[0]] if workload.critic else [])]
    said = [line for model in models if (line := model_shapes.guess_note(model))]
    said.append(f"lengths: {simulation.sequences.source}")
    said.append(
        f"{hardware.name}: {hardware.peak / 1e12:.3g} TFLOP/s, of which matrix products reach {hardware.gemm.ceiling:.0%}, attention "
        f"{hardware.attention:.0%}; {hardware.allowance / 1e9:.2g} GB a device is not for tensors; see hardware.toml, or the file given"
    )
    if workload.generation is not None:
        said.append(
            f"verification: {VERDICTS_PER_SECOND:.0f} responses a second, as `math` on two cores; the rest of the host's cores stand by"
        )
    if workload.reference == "offloaded":
        said.append(f"an offloaded reference moves at {HOST_BANDWIDTH / 1e9:g} GB/s a GPU")
    said.append("not counted: reading data, building batches, evaluation, checkpoints, stragglers, failures; watts are the data sheet's")
    return said
