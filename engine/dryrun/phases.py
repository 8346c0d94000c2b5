"""Predict seconds and model FLOPs of each phase of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from engine.algorithms.workload import Generation
from engine.dryrun.clock import CostModel
from engine.dryrun.decoding import generation_time
from engine.dryrun.memory import seqs_per_group
from engine.dryrun.workload import Simulation

VERDICTS_PER_SECOND = 685.0  # `math` on two cores: benchmarks/results/verifiers_cpu2_2026-11-22.md
HOST_BANDWIDTH = 5e9  # bytes/s per GPU to or from pageable host memory, with all GPUs of a node copying; assumed

GENERATION = ("prefill", "decoding")


class Phase(NamedTuple):
    """One phase of a step. `flops`: of all GPUs together, without padding and recomputation. `concurrent`: the phase runs on generator
    ranks while the other ranks run the phases that are not concurrent."""

    name: str
    seconds: float
    flops: float = 0.0
    concurrent: bool = False


def phases(simulation: Simulation) -> list[Phase]:
    """Phases of one step, in order. With asynchronous generation, of a step in steady state: generation for the next step is concurrent."""
    generation = simulation.workload.generation
    return list(_supervised(simulation)) if generation is None else list(_with_generation(simulation, generation))


def one_time_phases(simulation: Simulation, steps: int) -> list[Phase]:
    """Phases before the first of `steps` steps: the reference log-probs, if they are cached."""
    if simulation.workload.reference != "cached":
        return []
    passes = steps / max(1.0, simulation.workload.passes)
    flops = simulation.policy.model.forward_flops(simulation.sequences.lengths_N)
    return [Phase("reference log-probs", passes * simulation.policy.forward_seconds, passes * flops)]


def _supervised(simulation: Simulation) -> Iterator[Phase]:
    policy = simulation.policy
    yield Phase("forward and backward", policy.pipeline_seconds, 3 * policy.model.forward_flops(simulation.sequences.lengths_N))
    yield Phase("gradient reduction", policy.update.reduction)
    yield Phase("optimizer", policy.update.optimizer)


def _with_generation(simulation: Simulation, generation: Generation) -> Iterator[Phase]:
    generating, learning = list(_generation(simulation, generation)), list(_learning(simulation))
    if simulation.generator is None:
        yield from [*generating, *learning]
        return
    ahead = generation.rollout.max_staleness > 0
    yield from (phase._replace(concurrent=ahead) for phase in generating)
    yield Phase("weight sync", _weight_sync(simulation, simulation.generator))
    if ahead:
        yield Phase("waiting for responses", max(0.0, seconds_of(generating) - seconds_of(learning)))
    yield from learning


def seconds_of(phases: Iterable[Phase]) -> float:
    """Sum of the phases that are not concurrent."""
    return sum(phase.seconds for phase in phases if not phase.concurrent)


def _learning(simulation: Simulation) -> Iterator[Phase]:
    lengths_N = simulation.sequences.lengths_N
    forward = {trained.name: trained.model.forward_flops(lengths_N) for trained in simulation.models}
    yield Phase("verification", len(lengths_N) / VERDICTS_PER_SECOND)
    workload = simulation.workload
    if workload.policy_logprobs:
        yield Phase("log-probs, policy", simulation.policy.forward_seconds, forward["policy"])
    if workload.reference != "none":
        yield Phase("log-probs, reference", simulation.policy.forward_seconds + _reference_swap(simulation), forward["policy"])
    if simulation.critic is not None:
        yield Phase("values, critic", simulation.critic.forward_seconds, forward["critic"])
    updates = workload.epochs * workload.minibatches
    for trained in simulation.models:
        yield Phase(f"updates, {trained.name}", updates * trained.update_seconds, 3 * workload.epochs * forward[trained.name])


def _generation(simulation: Simulation, generation: Generation) -> Iterator[Phase]:
    """Prefill and decoding of the first replica, which gets every dp-th sequence; all replicas have nearly the same work."""
    sequences, model = simulation.sequences, simulation.policy.model
    prompts, responses = (column[:: simulation.generation_clock.dp].tolist() for column in (sequences.prompt_N, sequences.response_N))
    setting = generation.rollout.cuda_graphs
    graphs = setting == "on" or (setting == "auto" and simulation.hardware.width == 2)  # on GPUs
    slots = seqs_per_group(simulation, generation)
    predicted = generation_time(simulation.generation_clock, model, prompts, responses, slots, graphs=graphs)
    prompt_flops = model.forward_flops(sequences.prompt_N)
    phase_costs = ((predicted.prefill, prompt_flops), (predicted.decode, model.forward_flops(sequences.lengths_N) - prompt_flops))
    yield from (Phase(name, *costs) for name, costs in zip(GENERATION, phase_costs, strict=True))


def _weight_sync(simulation: Simulation, generator: CostModel) -> float:
    """Seconds to send weights from the first training replica to all generator replicas, which are in other nodes if there are several."""
    largest = max(sum(stage.weights for stage in rank) for rank in simulation.policy.ranks)
    return generator.weight_sync(largest, generator.dp, apart=simulation.gpus > simulation.hardware.node)


def _reference_swap(simulation: Simulation) -> float:
    """Seconds to swap an offloaded reference in and out: three copies, of the policy's weights to the host, the reference's to the GPU, and
    the policy's back."""
    if simulation.workload.reference == "resident":
        return 0.0
    return 3 * max(sum(stage.weights for stage in rank) for rank in simulation.policy.ranks) / HOST_BANDWIDTH
