"""Jobs of tests/distributed/test_token_loss.py; see tests/support/jobs.py."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from engine import losses
from engine.batching.build import batch
from engine.config import Model, Parallel
from engine.distributed.world import World, deterministic
from engine.types import LossFunction, Sample, TokenLoss
from tests.support.jobs import OPTIM, samples

PPO = {"average": "sequence", "clip_low": 0.1, "clip_high": 0.3, "kl": "k3"}
LOSSES: dict[str, TokenLoss] = {
    "sft": losses.SFT_LOSS,
    "clipped": losses.ppo(False, **PPO, kl_coef=0.0),
    "clipped, with KL": losses.ppo(False, **PPO, kl_coef=0.2),
    "on policy": losses.ppo(True, **(PPO | {"average": "token"}), kl_coef=0.2),
}


def rollouts(seed: int) -> list[Sample]:
    """Random sequences with advantages, and log-probs close to those of an untrained model."""
    draw = np.random.default_rng(seed)

    def noisy_logprobs(size: int) -> np.ndarray:
        return draw.normal(-5.5, 0.3, size).astype(np.float32)

    def with_rollout_fields(sample: Sample) -> Sample:
        size = sample.length
        advantage = draw.normal(size=size).astype(np.float32)
        return replace(sample, advantage=advantage, old_logprob=noisy_logprobs(size), ref_logprob=noisy_logprobs(size))

    return [with_rollout_fields(sample) for sample in samples(seed)]


def learned(world: World, parallel: Parallel, model: Model) -> dict[str, tuple[Any, Any]]:
    """Metrics of two steps for each loss, computed in the output layer and by autograd from the log-probs."""
    return {name: (_steps(world, parallel, model, loss), _steps(world, parallel, model, loss.loss)) for name, loss in LOSSES.items()}


def _steps(world: World, parallel: Parallel, model: Model, loss: LossFunction) -> list[dict[str, float]]:
    from engine.megatron.policy import Policy

    # The policy loss also needs the entropy.
    entropy = loss is LOSSES["on policy"] or loss is LOSSES["on policy"].loss
    with closing(Policy(model, OPTIM, parallel, world)) as policy:
        update = partial(policy.update, loss=loss, lr=1e-2, temperature=0.8, entropy=entropy)
        return [update(batch(rollouts(seed), 64, **policy.batch_options)) for seed in range(2)]


def repeated(world: World, parallel: Parallel, model: Model, on: bool) -> list[list[dict[str, float]]]:
    """Metrics of two steps with each loss, with or without deterministic mode."""
    with deterministic(on):
        return [_steps(world, parallel, model, loss) for loss in LOSSES.values()]
