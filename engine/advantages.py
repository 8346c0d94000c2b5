"""Advantages of sampled responses: by a critic (GAE), or by the other samples of the same prompt. Samples in, samples out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from engine.config.choices import Kl, Whiten
from engine.types import Sample
from triton_kernels import gae, merge_partials


def kl_estimate(logprob: np.ndarray, ref_logprob: np.ndarray, kind: Kl) -> np.ndarray:
    """Of KL(policy, reference) in nats at each token, from the token that the policy drew (Schulman 2020, joschu.net/blog/kl-approx.html):
    k1 = log(p/q), k2 = log(p/q)^2 / 2, k3 = q/p - 1 + log(p/q)."""
    ratio = logprob.astype(np.float64) - ref_logprob
    if kind == "k1":
        return ratio
    return ratio**2 / 2 if kind == "k2" else np.expm1(-ratio) + ratio


def token_rewards(sample: Sample, kl_coef: float, kl: Kl) -> np.ndarray:
    """-kl_coef * KL at each response token, and the sample's score on the last of them; float32 [L] (arXiv 2411.15124, section 6)."""
    rewards = np.zeros(sample.length)
    if kl_coef:
        assert sample.old_logprob is not None
        assert sample.ref_logprob is not None
        rewards = -kl_coef * kl_estimate(sample.old_logprob, sample.ref_logprob, kl) * sample.mask
    rewards[last_token(sample)] += _score(sample)
    return rewards.astype(np.float32)


def _score(sample: Sample) -> float:
    score = float(sample.reward or 0.0)
    if not math.isfinite(score):
        raise ValueError(f"reward={score} of a response is no number to learn from; look at what scored it")
    return score


def last_token(sample: Sample) -> int:
    """The place of the response's last token: the last that the mask counts."""
    return int(np.flatnonzero(sample.mask)[-1])


def by_critic(
    samples: Sequence[Sample], *, kl_coef: float, kl: Kl, gamma: float, lam: float, whiten: Whiten, ranks: int, device: torch.device
) -> list[Sample]:
    """`samples` with `advantage` and `returns`, by generalized advantage estimation from their `value` (arXiv 1506.02438).

    whiten: "batch" brings the advantages of all response tokens to mean 0 and variance 1, "rank" those of each of `ranks` equal parts of
    the batch, as Tülu 3's trainer did, "none" leaves them. Returns are those of the raw advantages in any case. Raises ValueError for a
    reward that is not finite.
    """
    if not samples:
        return []
    values = [np.asarray(sample.value) for sample in samples]
    rewards = [token_rewards(sample, kl_coef, kl) for sample in samples]
    reward_T, value_T, mask_T = (
        torch.from_numpy(np.concatenate(column)).to(device) for column in (rewards, values, [s.mask for s in samples])
    )
    lengths = [sample.length for sample in samples]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])
    advantage_T, returns_T, partials_3S = gae(reward_T, value_T, mask_T, cu_seqlens, gamma, lam)
    advantages, returns = (list(x.cpu().split(lengths)) for x in (advantage_T, returns_T))
    parts = {"batch": 1, "rank": ranks, "none": 0}[whiten]
    for part in np.array_split(np.arange(len(samples)), parts) if parts else ():
        mean, scale = _whitening(partials_3S[:, part])
        for i in part:
            advantages[i] = (advantages[i] - mean) * scale * torch.from_numpy(samples[i].mask)
    return [replace(s, advantage=a.numpy(), returns=r.numpy()) for s, a, r in zip(samples, advantages, returns, strict=True)]


def _whitening(partials_3S: torch.Tensor) -> tuple[float, float]:
    n, mean, m2 = merge_partials(partials_3S)
    return mean, (1 / math.sqrt(m2 / (n - 1) + 1e-8) if n > 1 else 1.0)


def by_group(samples: Sequence[Sample], prompts: Sequence[int], scale: Literal["std", "none"]) -> list[Sample]:
    """`samples` with `advantage`: the score less the mean of its group's scores, the same at every response token.

    A group is the samples of one prompt; prompts[i] is that of samples[i]. scale: "std" divides by the group's standard deviation, as GRPO
    does (arXiv 2402.03300, equation 3); "none" does not (arXiv 2503.20783), which is RLOO (arXiv 2402.14740) but for a factor G / (G - 1).
    A group that agrees has advantage 0. Raises ValueError for a reward that is not finite.
    """
    scores = defaultdict[int, list[float]](list)
    for sample, prompt in zip(samples, prompts, strict=True):
        scores[prompt].append(_score(sample))
    found = []
    for sample, prompt in zip(samples, prompts, strict=True):
        group = np.array(scores[prompt])
        advantage = _score(sample) - group.mean()
        if scale == "std":
            advantage /= group.std(ddof=1) + 1e-4 if len(group) > 1 else 1.0
        found.append(replace(sample, advantage=(sample.mask * advantage).astype(np.float32)))
    return found


def off_policy(samples: Sequence[Sample], sampler_logprobs: Sequence[np.ndarray], most: float) -> tuple[list[Sample], np.ndarray]:
    """`samples` with each response token's advantage times min(p / q, most), and those weights, float64, end to end. p is the token's
    probability by the policy that starts to learn (old_logprob), q by the one that drew it (sampler_logprobs[i], response tokens only).

    Truncated importance sampling (Ionides 2008, doi 10.1198/106186008X320456) beside a clip around p (arXiv 2505.24298, equation 5). The
    clipped loss is homogeneous in the advantage: this multiplies it by the weight, which has no gradient. KL to the reference inside the
    loss (advantage="group") and the critic's loss go by the tokens as they were drawn.
    """
    found, weights = [], []
    for sample, drawn in zip(samples, sampler_logprobs, strict=True):
        assert sample.old_logprob is not None
        assert sample.advantage is not None
        advantage, places = sample.advantage.copy(), sample.mask > 0
        with np.errstate(over="ignore"):
            weights.append(np.minimum(np.exp(sample.old_logprob[places].astype(np.float64) - drawn), most))
        advantage[places] *= weights[-1]
        found.append(replace(sample, advantage=advantage))
    return found, np.concatenate(weights)


def explained_variance(samples: Sequence[Sample]) -> float:
    """1 - Var(returns - value) / Var(returns) over response tokens: 1 for a critic that knows, 0 for one that says the same of all."""
    returns, values = (np.concatenate([np.asarray(getattr(s, name))[s.mask > 0] for s in samples]) for name in ("returns", "value"))
    spread = returns.astype(np.float64).var()
    return float(1 - (returns.astype(np.float64) - values).var() / spread) if spread > 0 else 0.0
