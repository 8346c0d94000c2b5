"""Metrics of a step's responses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.advantages import explained_variance, kl_estimate
from engine.rollout.verification import Rollout
from engine.types import Sample


def rollout_metrics(rollouts: Sequence[Rollout], samples: Sequence[Sample]) -> dict[str, float]:
    """Metrics of a step's responses.

    policy/kl, policy/kl3      mean over responses of the sum over tokens of log(policy / reference), in nats (k1); mean over tokens of k3
    policy/entropy             mean over tokens of the entropy of the policy's distribution at the sampling temperature, in nats
    policy/neg_logprob         mean over tokens of -log p of the sampled token, in nats: an estimate of the entropy from the samples
    rollout/logprob_diff       mean of |log-prob of the sampler - log-prob of the trainer| of the sampled tokens; also its maximum,
                               rollout/logprob_diff_max. With RLVR.single_update these and the entropy are metrics of the update instead
    reward/zero_std_frac       share of prompts whose samples all have the same score: no signal for advantage="group"
    """
    logprobs = [s.old_logprob[s.mask > 0] for s in samples if s.old_logprob is not None]
    scores: dict[int, set[float]] = {}
    for rollout, sample in zip(rollouts, samples, strict=True):
        scores.setdefault(rollout.prompt.id, set()).add(sample.reward or 0.0)
    metrics = {
        "reward/mean": np.mean([s.reward or 0.0 for s in samples]),
        "reward/solve_rate": np.mean([r.verdict.correct and r.response.stopped for r in rollouts]),
        "rollout/length": np.mean([len(r.response.tokens) for r in rollouts]),
        "rollout/no_stop": np.mean([not r.response.stopped for r in rollouts]),
        "policy/neg_logprob": -np.concatenate(logprobs).mean(),
        "reward/zero_std_frac": np.mean([len(values) == 1 for values in scores.values()]),
    }
    if samples[0].entropy is not None:
        gap = np.abs(np.concatenate(logprobs) - np.concatenate([r.response.logprobs for r in rollouts]))
        entropy = np.concatenate([s.entropy[s.mask > 0] for s in samples])  # type: ignore[index]
        metrics |= {"policy/entropy": entropy.mean(), "rollout/logprob_diff": gap.mean(), "rollout/logprob_diff_max": gap.max()}
    if samples[0].ref_logprob is not None:
        pairs = [(s.old_logprob[s.mask > 0], s.ref_logprob[s.mask > 0]) for s in samples]  # type: ignore[index]
        metrics["policy/kl"] = np.mean([kl_estimate(old, ref, "k1").sum() for old, ref in pairs])
        metrics["policy/kl3"] = np.concatenate([kl_estimate(old, ref, "k3") for old, ref in pairs]).mean()
    if samples[0].value is not None:
        metrics["critic/explained_variance"] = explained_variance(samples)
    return {name: float(value) for name, value in metrics.items()}
