"""Bytes on the GPUs of each pipeline rank: what stays, and what each moment of a step adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.algorithms.workload import Generation
from engine.dryrun.types import Stage
from engine.dryrun.workload import Simulation, TrainedModel
from engine.megatron.weight_sync import BUCKET_BYTES

IDS = 3 * 8 + 1 + 8  # bytes of a token on the device: ids, targets and positions as int64, the mask, its place among the wanted rows


@dataclass(frozen=True)
class RankMemory:
    """The GPUs of one pipeline rank. Bytes of one GPU, at the moment when it holds most."""

    pp: int
    layers: int
    params: int
    parts: dict[str, int]
    moment: str
    moments: dict[str, int]  # peak of each moment
    capacity: int
    trains: bool = True  # False: it only generates

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.capacity


def memory_of_ranks(simulation: Simulation) -> list[RankMemory]:
    """Every pipeline rank's memory: of those that train, then of those that only generate."""
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
    """What is there all the time. A reference that is offloaded takes the policy's place when it speaks: nothing."""
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
        yield "handing weights", _weight_sync(simulation, pp)
    for trained in simulation.models:
        if simulation.workload.token_values:  # reads log-probs or values before it learns
            read = max(stage.inference_peak for stage in trained.ranks[pp])
            yield f"reading, {trained.name}", {"activations": read, "batch": _batch(simulation, trained, trained.forward_pass.tokens, pp)}
        held, peak = ([getattr(stage, what) for stage in trained.ranks[pp]] for what in ("held", "peak"))
        most = trained.update.timeline.most_held(pp, held, peak)
        yield f"update, {trained.name}", {"activations": int(most), "batch": _batch(simulation, trained, trained.update_batch.tokens, pp)}


def _generator_moments(simulation: Simulation, pp: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Of ranks that only generate: the cache is made for each step's responses, and let go."""
    assert simulation.workload.generation is not None
    yield "generation", _generation(simulation, simulation.workload.generation, pp)
    yield "handing weights", _weight_sync(simulation, pp)


def _weight_sync(simulation: Simulation, pp: int) -> dict[str, int]:
    """Weights travel some at a time, in one piece."""
    return {"batch": min(BUCKET_BYTES, sum(stage.weights for stage in simulation.policy.ranks[pp]))}


def _batch(simulation: Simulation, trained: TrainedModel, tokens: int, pp: int) -> int:
    """All microbatches of a pass lie on the device from its start, with the angles of their positions; what the last stage says of each
    token is kept to its end."""
    angles = 4 * trained.model.head_dim
    columns = 4 * simulation.workload.token_values
    said = 4 if pp == trained.parallel.pp - 1 else 0
    return tokens * (IDS + columns + angles + said)


def seqs_per_group(simulation: Simulation, generation: Generation) -> int:
    """Sequences under way at once on each replica, in each of its groups: rollout/sampler.py's rule, where the cache holds least. Raises
    ValueError for a cache that does not hold one for each group."""
    groups, positions = simulation.run.parallel.pp, generation.max_prompt_tokens + generation.max_response_tokens
    most = -(-len(simulation.sequences.lengths_N) // simulation.generation_clock.dp)
    bytes_of = max(_slot_bytes(simulation, pp, positions) for pp in range(groups))
    return max(1, min(generation.rollout.max_num_seqs, generation.rollout.max_cached_seqs(bytes_of, positions, groups), most) // groups)


def _slot_bytes(simulation: Simulation, pp: int, positions: int) -> int:
    layers = sum(stage.layers for stage in simulation.policy.ranks[pp])
    return simulation.policy.model.kv_cache_bytes(layers, simulation.run.parallel.tp, positions, simulation.hardware.width)


def _generation(simulation: Simulation, generation: Generation, pp: int) -> dict[str, int]:
    """The caches for the longest that may come, and a forward of a wave: a token of each slot of a group, and prompts."""
    each, groups = seqs_per_group(simulation, generation), simulation.run.parallel.pp
    wave = each + max(generation.rollout.max_prefill_tokens, int(simulation.sequences.prompt_N.max()))
    read = max(stage.inference_peak for stage in simulation.policy.ranks[pp])
    cache = groups * each * _slot_bytes(simulation, pp, generation.max_prompt_tokens + generation.max_response_tokens)
    return {"cache": cache, "activations": read * wave // sum(simulation.policy.lengths)}
