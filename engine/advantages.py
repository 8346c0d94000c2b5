"""Advantages of sampled responses: from a critic (GAE), or relative to the other samples of the same prompt (GRPO, RLOO)."""

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
    """Estimate of KL(policy, reference) in nats at each token, from the sampled token (Schulman 2020, joschu.net/blog/kl-approx.html).

    k1 = log(p/q), k2 = log(p/q)^2 / 2, k3 = q/p - 1 + log(p/q), for p of the policy and q of the reference. float64 [L].
    """
    ratio = logprob.astype(np.float64) - ref_logprob
    if kind == "k1":
        return ratio
    return ratio**2 / 2 if kind == "k2" else np.expm1(-ratio) + ratio


def token_rewards(sample: Sample, kl_coef: float, kl: Kl, place: int) -> np.ndarray:
    """-kl_coef * KL at each response token, plus the sample's score at position `place`; float32 [L] (arXiv 2411.15124, section 6)."""
    rewards = np.zeros(sample.length)
    if kl_coef:
        assert sample.old_logprob is not None
        assert sample.ref_logprob is not None
        rewards = -kl_coef * kl_estimate(sample.old_logprob, sample.ref_logprob, kl) * sample.mask
    rewards[place] += _score(sample)
    return rewards.astype(np.float32)


def _score(sample: Sample) -> float:
    score = float(sample.reward or 0.0)
    if not math.isfinite(score):
        raise ValueError(f"reward={score} of a response is not finite; check the verifier or reward model that returned it")
    return score


def last_token(sample: Sample) -> int:
    """Index of the response's last token: the last unmasked one."""
    return int(np.flatnonzero(sample.mask)[-1])


def by_critic(
    samples: Sequence[Sample],
    *,
    kl_coef: float,
    kl: Kl,
    gamma: float,
    lam: float,
    whiten: Whiten,
    ranks: int,
    device: torch.device,
    score_slot: bool = False,
) -> list[Sample]:
    """`samples` with `advantage` and `returns`, by generalized advantage estimation from their `value` (arXiv 1506.02438).

    whiten: "batch" normalizes the advantages of all response tokens to mean 0 and variance 1; "rank" does so separately for each of
    `ranks` equal parts of the batch, like Tülu 3's trainer; "none" does not normalize. Returns always use the raw advantages.
    score_slot: the score is the reward of each sample's last position, even if its mask is 0 (the slot after the stop token of Tülu 3's
    trainer), instead of the last response token. Such a slot has a value and a return, but no advantage.
    Raises ValueError if a reward is not finite.
    """
    if not samples:
        return []
    values = [np.asarray(sample.value) for sample in samples]
    places = [sample.length - 1 if score_slot else last_token(sample) for sample in samples]
    rewards = [token_rewards(sample, kl_coef, kl, place) for sample, place in zip(samples, places, strict=True)]
    masks = [_with_place(sample.mask, place) for sample, place in zip(samples, places, strict=True)]
    reward_T, value_T, mask_T = (torch.from_numpy(np.concatenate(column)).to(device) for column in (rewards, values, masks))
    lengths = [sample.length for sample in samples]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])
    advantage_T, returns_T, partials_3S = gae(reward_T, value_T, mask_T, cu_seqlens, gamma, lam)
    advantages, returns = (list(x.cpu().split(lengths)) for x in (advantage_T, returns_T))
    if score_slot:
        advantages = [advantage * torch.from_numpy(s.mask) for advantage, s in zip(advantages, samples, strict=True)]
        partials_3S = _partials(advantages, samples)
    parts = {"batch": 1, "rank": ranks, "none": 0}[whiten]
    for part in np.array_split(np.arange(len(samples)), parts) if parts else ():
        mean, scale = _whitening(partials_3S[:, part])
        for i in part:
            advantages[i] = (advantages[i] - mean) * scale * torch.from_numpy(samples[i].mask)
    return [replace(s, advantage=a.numpy(), returns=r.numpy()) for s, a, r in zip(samples, advantages, returns, strict=True)]


def _with_place(mask: np.ndarray, place: int) -> np.ndarray:
    mask = mask.copy()
    mask[place] = 1
    return mask


def _partials(advantages: Sequence[torch.Tensor], samples: Sequence[Sample]) -> torch.Tensor:
    """The partials that `gae` returns, over each sample's response tokens alone: float64 [3, S]."""
    tokens = [advantage.double()[torch.from_numpy(s.mask > 0)] for advantage, s in zip(advantages, samples, strict=True)]
    return torch.tensor([[len(x), x.mean(), (x - x.mean()).square().sum()] for x in tokens], dtype=torch.float64).T


def _whitening(partials_3S: torch.Tensor) -> tuple[float, float]:
    n, mean, m2 = merge_partials(partials_3S)
    return mean, (1 / math.sqrt(m2 / (n - 1) + 1e-8) if n > 1 else 1.0)


def by_group(samples: Sequence[Sample], prompts: Sequence[int], scale: Literal["std", "none"]) -> list[Sample]:
    """`samples` with `advantage`: the score minus the mean score of its group, the same at every response token.

    A group is the samples of one prompt; prompts[i] identifies that of samples[i]. scale: "std" divides by the group's standard deviation
    like GRPO (arXiv 2402.03300, equation 3); "none" does not (Dr. GRPO, arXiv 2503.20783), which is RLOO (arXiv 2402.14740) up to a
    factor of G / (G - 1). In a group of equal scores all advantages are 0. Raises ValueError if a reward is not finite.
    """
    scores = defaultdict[int, list[float]](list)
    for sample, prompt in zip(samples, prompts, strict=True):
        scores[prompt].append(_score(sample))
    with_advantages = []
    for sample, prompt in zip(samples, prompts, strict=True):
        group = np.array(scores[prompt])
        advantage = _score(sample) - group.mean()
        if scale == "std":
            advantage /= group.std(ddof=1) + 1e-4 if len(group) > 1 else 1.0
        with_advantages.append(replace(sample, advantage=(sample.mask * advantage).astype(np.float32)))
    return with_advantages


def off_policy(samples: Sequence[Sample], sampler_logprobs: Sequence[np.ndarray], most: float) -> tuple[list[Sample], np.ndarray]:
    """Truncated importance sampling (TIS): `samples` with advantages multiplied by w = min(p / q, most), and all w, float64, concatenated.

    p is a token's probability under the policy at the start of the step (old_logprob), q under the policy that sampled it
    (sampler_logprobs[i], response tokens only).

    Ionides 2008, doi 10.1198/106186008X320456, with PPO's clip around p (arXiv 2505.24298, equation 5). The clipped loss is homogeneous
    in the advantage, so this multiplies the loss by w, without a gradient through w. The KL term in the loss (advantage="group") and the
    critic's loss are not reweighted.
    """
    reweighted, weights = [], []
    for sample, sampler_logprob in zip(samples, sampler_logprobs, strict=True):
        assert sample.old_logprob is not None
        assert sample.advantage is not None
        advantage, response = sample.advantage.copy(), sample.mask > 0
        with np.errstate(over="ignore"):
            weights.append(np.minimum(np.exp(sample.old_logprob[response].astype(np.float64) - sampler_logprob), most))
        advantage[response] *= weights[-1]
        reweighted.append(replace(sample, advantage=advantage))
    return reweighted, np.concatenate(weights)


def explained_variance(samples: Sequence[Sample]) -> float:
    """1 - Var(returns - value) / Var(returns) over response tokens: 1 for a perfect critic, 0 for one that predicts a constant."""
    returns, values = (np.concatenate([np.asarray(getattr(s, name))[s.mask > 0] for s in samples]) for name in ("returns", "value"))
    spread = returns.astype(np.float64).var()
    return float(1 - (returns.astype(np.float64) - values).var() / spread) if spread > 0 else 0.0
