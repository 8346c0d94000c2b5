"""Seconds of each phase of a step, and the floating-point operations in it that do the model's work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from engine.algorithms.workload import Generation
from engine.dryrun.clock import CostModel
from engine.dryrun.decoding import generation_time
from engine.dryrun.memory import seqs_per_group
from engine.dryrun.workload import Simulation

VERDICTS_PER_SECOND = 685.0  # a second, of `math` on two cores: benchmarks/results/verifiers_cpu2_2026-11-22.md
HOST_BANDWIDTH = 5e9  # bytes/s of a GPU between its memory and pageable memory of the host, all of a node at once; assumed

GENERATION = ("prefill", "decoding")


class Phase(NamedTuple):
    """`flops`: of all GPUs together, without padding and recomputation. `beside`: on ranks of their own, while others go through the
    phases that are not."""

    name: str
    seconds: float
    flops: float = 0.0
    concurrent: bool = False


def phases(simulation: Simulation) -> list[Phase]:
    """Of one step of the recipe, in order; of a step in the middle, where the next one's responses are drawn ahead."""
    generation = simulation.workload.generation
    return list(_supervised(simulation)) if generation is None else list(_with_generation(simulation, generation))


def one_time_phases(simulation: Simulation, steps: int) -> list[Phase]:
    """What a run of `steps` does before its first: with a cached reference, its log-probs."""
    if simulation.workload.reference != "cached":
        return []
    passes = steps / max(1.0, simulation.workload.passes)
    flops = simulation.policy.model.forward_flops(simulation.sequences.lengths_N)
    return [Phase("reference log-probs", passes * simulation.policy.forward_seconds, passes * flops)]


def _supervised(simulation: Simulation) -> Iterator[Phase]:
    policy = simulation.policy
    yield Phase("forward and backward", policy.pipeline_seconds, 3 * policy.model.forward_flops(simulation.sequences.lengths_N))
    yield Phase("gradients' reduction", policy.update.reduction)
    yield Phase("optimizer", policy.update.optimizer)


def _with_generation(simulation: Simulation, generation: Generation) -> Iterator[Phase]:
    drawing, learning = list(_generation(simulation, generation)), list(_learning(simulation))
    if simulation.generator is None:
        yield from [*drawing, *learning]
        return
    ahead = generation.rollout.max_staleness > 0
    yield from (phase._replace(concurrent=ahead) for phase in drawing)
    yield Phase("handing weights", _weight_sync(simulation, simulation.generator))
    if ahead:
        yield Phase("waiting for responses", max(0.0, seconds_of(drawing) - seconds_of(learning)))
    yield from learning


def seconds_of(phases: Iterable[Phase]) -> float:
    """Of phases one after the other."""
    return sum(phase.seconds for phase in phases if not phase.concurrent)


def _learning(simulation: Simulation) -> Iterator[Phase]:
    lengths_N = simulation.sequences.lengths_N
    whole = {trained.name: trained.model.forward_flops(lengths_N) for trained in simulation.models}
    yield Phase("verification", len(lengths_N) / VERDICTS_PER_SECOND)
    workload = simulation.workload
    if workload.policy_logprobs:
        yield Phase("log-probs, policy", simulation.policy.forward_seconds, whole["policy"])
    if workload.reference != "none":
        yield Phase("log-probs, reference", simulation.policy.forward_seconds + _reference_swap(simulation), whole["policy"])
    if simulation.critic is not None:
        yield Phase("values, critic", simulation.critic.forward_seconds, whole["critic"])
    updates = workload.epochs * workload.minibatches
    for trained in simulation.models:
        yield Phase(f"updates, {trained.name}", updates * trained.update_seconds, 3 * workload.epochs * whole[trained.name])


def _generation(simulation: Simulation, generation: Generation) -> Iterator[Phase]:
    """Of the replica that got the first of each `replicas` sequences; all have nearly the same."""
    sequences, model = simulation.sequences, simulation.policy.model
    prompts, responses = (column[:: simulation.generation_clock.dp].tolist() for column in (sequences.prompt_N, sequences.response_N))
    setting = generation.rollout.cuda_graphs
    graphs = setting == "on" or (setting == "auto" and simulation.hardware.width == 2)  # on GPUs
    drawn = generation_time(simulation.generation_clock, model, prompts, responses, seqs_per_group(simulation, generation), graphs=graphs)
    asked = model.forward_flops(sequences.prompt_N)
    drawing = ((drawn.prefill, asked), (drawn.decode, model.forward_flops(sequences.lengths_N) - asked))
    yield from (Phase(name, *costs) for name, costs in zip(GENERATION, drawing, strict=True))


def _weight_sync(simulation: Simulation, generator: CostModel) -> float:
    """Weights go from the first replica that trains to all that only generate, which are in other nodes where the launch has several."""
    largest = max(sum(stage.weights for stage in rank) for rank in simulation.policy.ranks)
    return generator.weight_sync(largest, generator.dp, apart=simulation.gpus > simulation.hardware.node)


def _reference_swap(simulation: Simulation) -> float:
    """An offloaded reference takes the policy's place: its weights go out, those of the reference come in, and the policy's again."""
    if simulation.workload.reference == "resident":
        return 0.0
    return 3 * max(sum(stage.weights for stage in rank) for rank in simulation.policy.ranks) / HOST_BANDWIDTH
