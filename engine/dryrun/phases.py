"""Seconds of each phase of a step, and the floating-point operations in it that do the model's work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from engine.algorithms.dpo import DPO
from engine.algorithms.rlvr import RLVR
from engine.config import Llama
from engine.dryrun.clock import Clock
from engine.dryrun.decoding import rollout
from engine.dryrun.memory import slots
from engine.dryrun.workload import Scene

VERDICTS = 685.0  # a second, of `math` on two cores: benchmarks/results/verifiers_cpu2_2026-11-22.md
HOST_LINK = 5e9  # bytes/s of a GPU between its memory and pageable memory of the host, all of a node at once; assumed

DRAWING = ("prefill", "decoding")


class Phase(NamedTuple):
    """`flops`: of all GPUs together, without padding and recomputation. `beside`: on ranks of their own, while others go through the
    phases that are not."""

    name: str
    seconds: float
    flops: float = 0.0
    beside: bool = False


def phases(scene: Scene) -> list[Phase]:
    """Of one step of the recipe, in order; of a step in the middle, where the next one's responses are drawn ahead."""
    algorithm = scene.run.algorithm
    return list(_rlvr(scene, algorithm)) if isinstance(algorithm, RLVR) else list(_supervised(scene))


def once(scene: Scene, steps: int) -> list[Phase]:
    """What a run of `steps` does before its first: DPO computes the reference's log-probs."""
    if not isinstance(scene.run.algorithm, DPO):
        return []
    passes = steps / max(1.0, scene.run.algorithm.epochs)
    flops = forward_flops(scene.policy.model, scene.sequences.lengths_N)
    return [Phase("reference log-probs", passes * scene.policy.reading_seconds, passes * flops)]


def forward_flops(model: Llama, lengths_N: np.ndarray) -> float:
    """Two a matrix parameter and token, and four a head dimension and pair of positions of causal attention (the two products)."""
    lengths = lengths_N.astype(float)
    matrices = model.parameters - model.hidden * model.vocab * (not model.tied)
    pairs = (lengths * (lengths + 1) / 2).sum()
    return 2.0 * matrices * lengths.sum() + 4.0 * model.layers * model.heads * model.head_dim * pairs


def _supervised(scene: Scene) -> Iterator[Phase]:
    policy = scene.policy
    yield Phase("forward and backward", policy.pipeline_seconds, 3 * forward_flops(policy.model, scene.sequences.lengths_N))
    yield Phase("gradients' reduction", policy.update.reduction)
    yield Phase("optimizer", policy.update.optimizer)


def _rlvr(scene: Scene, algorithm: RLVR) -> Iterator[Phase]:
    drawing, learning = list(_generation(scene, algorithm)), list(_learning(scene, algorithm))
    if scene.generator is None:
        yield from [*drawing, *learning]
        return
    ahead = algorithm.rollout.lag > 0
    yield from (phase._replace(beside=ahead) for phase in drawing)
    yield Phase("handing weights", _handing(scene, scene.generator))
    if ahead:
        yield Phase("waiting for responses", max(0.0, seconds_of(drawing) - seconds_of(learning)))
    yield from learning


def seconds_of(phases: Iterable[Phase]) -> float:
    """Of phases one after the other."""
    return sum(phase.seconds for phase in phases if not phase.beside)


def _learning(scene: Scene, algorithm: RLVR) -> Iterator[Phase]:
    lengths_N = scene.sequences.lengths_N
    whole = {trained.name: forward_flops(trained.model, lengths_N) for trained in scene.trained}
    yield Phase("verification", len(lengths_N) / VERDICTS)
    if not algorithm.learns_once:
        yield Phase("log-probs, policy", scene.policy.reading_seconds, whole["policy"])
    if algorithm.kl_coef:
        yield Phase("log-probs, reference", scene.policy.reading_seconds + _moving(scene, algorithm), whole["policy"])
    if scene.critic is not None:
        yield Phase("values, critic", scene.critic.reading_seconds, whole["critic"])
    updates = algorithm.epochs * algorithm.minibatches
    for trained in scene.trained:
        yield Phase(f"updates, {trained.name}", updates * trained.update_seconds, 3 * algorithm.epochs * whole[trained.name])


def _generation(scene: Scene, algorithm: RLVR) -> Iterator[Phase]:
    """Of the replica that got the first of each `replicas` sequences; all have nearly the same."""
    sequences, model = scene.sequences, scene.policy.model
    prompts, responses = (column[:: scene.draws.dp].tolist() for column in (sequences.prompt_N, sequences.response_N))
    setting = algorithm.rollout.graphs
    graphs = setting == "on" or (setting == "auto" and scene.hardware.width == 2)  # on GPUs
    drawn = rollout(scene.draws, model, prompts, responses, slots(scene, algorithm), graphs=graphs)
    asked = forward_flops(model, sequences.prompt_N)
    drawing = ((drawn.prefill, asked), (drawn.decode, forward_flops(model, sequences.lengths_N) - asked))
    yield from (Phase(name, *costs) for name, costs in zip(DRAWING, drawing, strict=True))


def _handing(scene: Scene, generator: Clock) -> float:
    """Weights go from the first replica that trains to all that only generate, which are in other nodes where the launch has several."""
    largest = max(sum(stage.weights for stage in rank) for rank in scene.policy.ranks)
    return generator.handed(largest, generator.dp, apart=scene.gpus > scene.hardware.node)


def _moving(scene: Scene, algorithm: RLVR) -> float:
    """An offloaded reference takes the policy's place: its weights go out, those of the reference come in, and the policy's again."""
    if algorithm.reference == "resident":
        return 0.0
    return 3 * max(sum(stage.weights for stage in rank) for rank in scene.policy.ranks) / HOST_LINK
