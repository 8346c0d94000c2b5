"""Bytes on the GPUs of each pipeline rank: what stays, and what each moment of a step adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.algorithms.dpo import DPO
from engine.algorithms.rlvr import RLVR
from engine.dryrun.types import Stage
from engine.dryrun.workload import Scene, Trained
from engine.megatron.policy import BUCKET_BYTES

IDS = 3 * 8 + 1 + 8  # bytes of a token on the device: ids, targets and positions as int64, the mask, its place among the wanted rows
COLUMNS = {RLVR: 5, DPO: 1}  # float32 values a token brings along: advantage, old and reference log-prob, value, return


@dataclass(frozen=True)
class Rank:
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


def ledger(scene: Scene) -> list[Rank]:
    """Every pipeline rank's memory: of those that train, then of those that only generate."""
    kinds = (True,) if scene.generator is None else (True, False)
    return [_rank(scene, pp, stages, trains) for trains in kinds for pp, stages in enumerate(scene.policy.ranks)]


def _rank(scene: Scene, pp: int, stages: list[Stage], trains: bool) -> Rank:
    lasting = _lasting(scene, pp) if trains else _read_only(scene, pp)
    moments = {name: lasting | added for name, added in (_moments if trains else _moments_apart)(scene, pp)}
    worst = max(moments, key=lambda name: sum(moments[name].values()))
    return Rank(
        pp=pp,
        layers=sum(stage.layers for stage in stages),
        params=sum(stage.parameters for stage in stages),
        parts=moments[worst],
        moment=worst,
        moments={name: sum(parts.values()) for name, parts in moments.items()},
        capacity=int(scene.hardware.memory),
        trains=trains,
    )


def _read_only(scene: Scene, pp: int) -> dict[str, int]:
    return {"weights": sum(stage.weights for stage in scene.policy.ranks[pp]), "context": int(scene.hardware.allowance)}


def _lasting(scene: Scene, pp: int) -> dict[str, int]:
    """What is there all the time. A reference that is offloaded takes the policy's place when it speaks: nothing."""
    policy = scene.policy.ranks[pp]
    parts = {
        "weights": sum(stage.weights for stage in policy),
        "gradients": sum(stage.gradients for stage in policy),
        "optimizer": sum(stage.optimizer for stage in policy),
        "context": int(scene.hardware.allowance),
    }
    algorithm = scene.run.algorithm
    if isinstance(algorithm, RLVR) and algorithm.kl_coef and algorithm.reference == "resident":
        parts["reference"] = parts["weights"]
    if scene.critic is not None:
        parts["critic"] = sum(stage.weights + stage.gradients + stage.optimizer for stage in scene.critic.ranks[pp])
    return parts


def _moments(scene: Scene, pp: int) -> Iterator[tuple[str, dict[str, int]]]:
    algorithm = scene.run.algorithm
    if isinstance(algorithm, RLVR) and (scene.generator is None or algorithm.held_out):  # the policy itself is evaluated
        yield "generation", _generation(scene, algorithm, pp)
    if scene.generator is not None:
        yield "handing weights", _handing(scene, pp)
    for trained in scene.trained:
        if algorithm.__class__ in COLUMNS:  # reads log-probs or values before it learns
            read = max(stage.inference_peak for stage in trained.ranks[pp])
            yield f"reading, {trained.name}", {"activations": read, "batch": _batch(scene, trained, trained.reading.tokens, pp)}
        held, peak = ([getattr(stage, what) for stage in trained.ranks[pp]] for what in ("held", "peak"))
        most = trained.update.timeline.most_held(pp, held, peak)
        yield f"update, {trained.name}", {"activations": int(most), "batch": _batch(scene, trained, trained.step.tokens, pp)}


def _moments_apart(scene: Scene, pp: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Of ranks that only generate: the cache is made for each step's responses, and let go."""
    assert isinstance(scene.run.algorithm, RLVR)
    yield "generation", _generation(scene, scene.run.algorithm, pp)
    yield "handing weights", _handing(scene, pp)


def _handing(scene: Scene, pp: int) -> dict[str, int]:
    """Weights travel some at a time, in one piece."""
    return {"batch": min(BUCKET_BYTES, sum(stage.weights for stage in scene.policy.ranks[pp]))}


def _batch(scene: Scene, trained: Trained, tokens: int, pp: int) -> int:
    """All microbatches of a pass lie on the device from its start, with the angles of their positions; what the last stage says of each
    token is kept to its end."""
    angles = 4 * trained.model.head_dim
    columns = 4 * COLUMNS.get(type(scene.run.algorithm), 0)
    said = 4 if pp == trained.parallel.pp - 1 else 0
    return tokens * (IDS + columns + angles + said)


def slots(scene: Scene, algorithm: RLVR) -> int:
    """Sequences under way at once on each replica, in each of its groups: rollout/sampler.py's rule, where the cache holds least. Raises
    ValueError for a cache that does not hold one for each group."""
    groups, positions = scene.run.parallel.pp, algorithm.max_prompt + algorithm.max_response
    most = -(-len(scene.sequences.lengths_N) // scene.draws.dp)
    bytes_of = max(_slot_bytes(scene, pp, positions) for pp in range(groups))
    return max(1, min(algorithm.rollout.slots, algorithm.rollout.held(bytes_of, positions, groups), most) // groups)


def _slot_bytes(scene: Scene, pp: int, positions: int) -> int:
    layers = sum(stage.layers for stage in scene.policy.ranks[pp])
    return scene.policy.model.cache_bytes(layers, scene.run.parallel.tp, positions, scene.hardware.width)


def _generation(scene: Scene, algorithm: RLVR, pp: int) -> dict[str, int]:
    """The caches for the longest that may come, and a forward of a wave: a token of each slot of a group, and prompts."""
    each, groups = slots(scene, algorithm), scene.run.parallel.pp
    wave = each + max(algorithm.rollout.prefill, int(scene.sequences.prompt_N.max()))
    read = max(stage.inference_peak for stage in scene.policy.ranks[pp])
    cache = groups * each * _slot_bytes(scene, pp, algorithm.max_prompt + algorithm.max_response)
    return {"cache": cache, "activations": read * wave // sum(scene.policy.lengths)}
