"""What there is to say of a step's responses: the field's numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.advantages import explained_variance, kl_estimate
from engine.rollout.verification import Rollout
from engine.types import Sample


def rollout_metrics(rollouts: Sequence[Rollout], samples: Sequence[Sample]) -> dict[str, float]:
    """The field's numbers for a step's responses.

    kl          mean over responses of the sum over tokens of log(policy / reference), in nats (k1); kl3: mean over tokens of k3
    entropy     mean over tokens of the entropy of the policy's distribution at the sampling temperature, in nats
    surprise    mean over tokens of -log p of the drawn token, in nats: its estimate from what was drawn
    sampler_gap |log-prob of the sampler - log-prob of the trainer| of the drawn tokens; it and entropy are left to the update that learns
                from the samples where that is what reads them
    agreeing    share of prompts whose samples all have the same score: they teach nothing to advantage="group"
    """
    drawn = [s.old_logprob[s.mask > 0] for s in samples if s.old_logprob is not None]
    scores: dict[int, set[float]] = {}
    for rollout, sample in zip(rollouts, samples, strict=True):
        scores.setdefault(rollout.prompt.id, set()).add(sample.reward or 0.0)
    found = {
        "reward": np.mean([s.reward or 0.0 for s in samples]),
        "solve_rate": np.mean([r.verdict.correct and r.response.stopped for r in rollouts]),
        "length": np.mean([len(r.response.tokens) for r in rollouts]),
        "no_stop": np.mean([not r.response.stopped for r in rollouts]),
        "surprise": -np.concatenate(drawn).mean(),
        "agreeing": np.mean([len(found) == 1 for found in scores.values()]),
    }
    if samples[0].entropy is not None:
        gap = np.abs(np.concatenate(drawn) - np.concatenate([r.response.logprobs for r in rollouts]))
        entropy = np.concatenate([s.entropy[s.mask > 0] for s in samples])  # type: ignore[index]
        found |= {"entropy": entropy.mean(), "sampler_gap": gap.mean(), "sampler_gap_max": gap.max()}
    if samples[0].ref_logprob is not None:
        pairs = [(s.old_logprob[s.mask > 0], s.ref_logprob[s.mask > 0]) for s in samples]  # type: ignore[index]
        found["kl"] = np.mean([kl_estimate(old, ref, "k1").sum() for old, ref in pairs])
        found["kl3"] = np.concatenate([kl_estimate(old, ref, "k3") for old, ref in pairs]).mean()
    if samples[0].value is not None:
        found["explained_variance"] = explained_variance(samples)
    return {name: float(value) for name, value in found.items()}
