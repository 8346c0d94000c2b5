"""Predict GPU memory of each pipeline rank: what is resident, and what each phase of a step adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.algorithms.workload import Generation
from engine.dryrun.types import Stage
from engine.dryrun.workload import Simulation, TrainedModel
from engine.megatron.weight_sync import BUCKET_BYTES

IDS = 3 * 8 + 1 + 8  # bytes per token on the device: ids, targets and positions as int64, the mask, its index among trained tokens


@dataclass(frozen=True)
class RankMemory:
    """Memory of one pipeline rank's GPUs, in bytes per GPU."""

    pp: int
    layers: int
    params: int
    parts: dict[str, int]  # bytes by kind at the peak
    moment: str  # phase of a step with the highest peak
    moments: dict[str, int]  # peak of each phase
    capacity: int
    trains: bool = True  # False: the rank only generates

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.capacity


def memory_of_ranks(simulation: Simulation) -> list[RankMemory]:
    """Memory of each pipeline rank: first those that train, then those that only generate."""
    kinds = (True,) if simulation.generator is None else (True, False)
    return [_rank(simulation, pp, stages, trains) for trains in kinds for pp, stages in enumerate(simulation.policy.ranks)]


def _rank(simulation: Simulation, pp: int, stages: list[Stage], trains: bool) -> RankMemory:
    lasting = _resident(simulation, pp) if trains else _read_only(simulation, pp)
    moments = {name: lasting | added for name, added in (_moments if trains else _generator_moments)(simulation, pp)}
    worst = max(moments, key=lambda name: sum(moments[name].values()))
    return RankMemory(
        pp=pp,
        layers=sum(stage.layers for stage in stages),
        params=sum(stage.parameters for stage in stages),
        parts=moments[worst],
        moment=worst,
        moments={name: sum(parts.values()) for name, parts in moments.items()},
        capacity=int(simulation.hardware.memory),
        trains=trains,
    )


def _read_only(simulation: Simulation, pp: int) -> dict[str, int]:
    return {"weights": sum(stage.weights for stage in simulation.policy.ranks[pp]), "context": int(simulation.hardware.allowance)}


def _resident(simulation: Simulation, pp: int) -> dict[str, int]:
    """Memory that is allocated in every phase. An offloaded reference adds nothing: it takes the place of the policy's weights while it
    computes log-probs."""
    policy = simulation.policy.ranks[pp]
    parts = {
        "weights": sum(stage.weights for stage in policy),
        "gradients": sum(stage.gradients for stage in policy),
        "optimizer": sum(stage.optimizer for stage in policy),
        "context": int(simulation.hardware.allowance),
    }
    if simulation.workload.reference == "resident":
        parts["reference"] = parts["weights"]
    if simulation.critic is not None:
        parts["critic"] = sum(stage.weights + stage.gradients + stage.optimizer for stage in simulation.critic.ranks[pp])
    return parts


def _moments(simulation: Simulation, pp: int) -> Iterator[tuple[str, dict[str, int]]]:
    generation = simulation.workload.generation
    if generation is not None and (simulation.generator is None or generation.evaluates):
        yield "generation", _generation(simulation, generation, pp)
    if simulation.generator is not None:
        yield "weight sync", _weight_sync(simulation, pp)
    for trained in simulation.models:
        if simulation.workload.token_values:  # computes log-probs or values before the update
            largest = max(stage.inference_peak for stage in trained.ranks[pp])
            batch = _batch(simulation, trained, trained.forward_pass.tokens, pp)
            yield f"inference, {trained.name}", {"activations": largest, "batch": batch}
        held, peak = ([getattr(stage, what) for stage in trained.ranks[pp]] for what in ("held", "peak"))
        most = trained.update.timeline.most_held(pp, held, peak)
        yield f"update, {trained.name}", {"activations": int(most), "batch": _batch(simulation, trained, trained.update_batch.tokens, pp)}


def _generator_moments(simulation: Simulation, pp: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Phases of ranks that only generate. The KV cache is allocated for each step and freed after it."""
    assert simulation.workload.generation is not None
    yield "generation", _generation(simulation, simulation.workload.generation, pp)
    yield "weight sync", _weight_sync(simulation, pp)


def _weight_sync(simulation: Simulation, pp: int) -> dict[str, int]:
    """Weights are sent in buckets, each one contiguous buffer."""
    return {"batch": min(BUCKET_BYTES, sum(stage.weights for stage in simulation.policy.ranks[pp]))}


def _batch(simulation: Simulation, trained: TrainedModel, tokens: int, pp: int) -> int:
    """Bytes of all microbatches of a pass. They are on the device from its start, with their rotary angles; the last stage also keeps one
    fp32 output per token until the end."""
    angles = 4 * trained.model.head_dim
    columns = 4 * simulation.workload.token_values
    outputs = 4 if pp == trained.parallel.pp - 1 else 0
    return tokens * (IDS + columns + angles + outputs)


def seqs_per_group(simulation: Simulation, generation: Generation) -> int:
    """Concurrent sequences per replica and pipeline group, by rollout/sampler.py's rule, on the rank whose cache holds the fewest.

    Raises ValueError if a cache cannot hold one sequence per group.
    """
    groups, positions = simulation.run.parallel.pp, generation.max_prompt_tokens + generation.max_response_tokens
    most = -(-len(simulation.sequences.lengths_N) // simulation.generation_clock.dp)
    bytes_of = max(_slot_bytes(simulation, pp, positions) for pp in range(groups))
    return max(1, min(generation.rollout.max_num_seqs, generation.rollout.max_cached_seqs(bytes_of, positions, groups), most) // groups)


def _slot_bytes(simulation: Simulation, pp: int, positions: int) -> int:
    layers = sum(stage.layers for stage in simulation.policy.ranks[pp])
    return simulation.policy.model.kv_cache_bytes(layers, simulation.run.parallel.tp, positions, simulation.hardware.width)


def _generation(simulation: Simulation, generation: Generation, pp: int) -> dict[str, int]:
    """Bytes of the KV caches for sequences of maximum length, and of one forward: a token of each sequence of a group, and prompts."""
    seqs, groups = seqs_per_group(simulation, generation), simulation.run.parallel.pp
    tokens = seqs + max(generation.rollout.max_prefill_tokens, int(simulation.sequences.prompt_N.max()))
    activations = max(stage.inference_peak for stage in simulation.policy.ranks[pp])
    cache = groups * seqs * _slot_bytes(simulation, pp, generation.max_prompt_tokens + generation.max_response_tokens)
    return {"cache": cache, "activations": activations * tokens // sum(simulation.policy.lengths)}
