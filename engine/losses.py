"""Losses: pure functions of (logprob_T or value_T, microbatch) that return sums and counts. Only the policy divides, once, over the whole
step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config.choices import Average
from engine.types import Loss, Moments, Packed, TokenLoss, TokenTerms
from triton_kernels import dpo_norm, ppo_loss, seq_logps, value_loss


def nll(logprob_T: Tensor, packed: Packed) -> Loss:
    """Negative log-likelihood of the trained tokens: total = -sum of logprob_T where mask_T; count = how many they are."""
    count = int(packed.counts().sum())
    total = -(logprob_T * packed.mask_T).sum()
    return Loss(total, count, {"loss": (total.detach(), count)})


def nll_terms(packed: Packed) -> TokenTerms:
    """`nll` as a sum over tokens."""
    return TokenTerms(packed.mask_T.float())


SFT_LOSS = TokenLoss(nll, nll_terms)


def dpo(
    logprob_T: Tensor, packed: Packed, *, beta: float, label_smoothing: float = 0.0, normalize: bool = True, nll_weight: float = 0.0
) -> Loss:
    """Direct preference optimisation of the pairs of a microbatch: total = sum of their losses, count = how many they are.

    A pair is the samples 2 p (chosen) and 2 p + 1 (rejected) of the batch; ref_logprob_T is the reference's. See triton_kernels.dpo_norm
    for the loss, `normalize` and `label_smoothing`. `nll_weight` adds that many times the chosen answer's negative log-likelihood per
    token: a mean over each answer of its own (Pang et al., arXiv 2404.19733, equation 2), so that it is a sum over pairs too. TRL's
    loss_type "sft" averages over all tokens of a microbatch instead, which is the same for pairs one by one and depends on the cut else.

    Metrics with a mean over pairs: rewards and their margin in nats (times beta), accuracy (margin above 0), sums of log-probs and numbers
    of counted tokens of both halves. length_bias is the correlation over pairs of the margin with how much longer the chosen half is.
    While the policy still is the reference, margins are rounding errors, and so are accuracy and length_bias.
    """
    assert packed.ref_logprob_T is not None, "DPO needs ref_logprob of every sample"
    pairs_P2 = _pairs(packed)
    where = (packed.mask_T, packed.cu_seqlens)
    loss_P, reward = dpo_norm(logprob_T, packed.ref_logprob_T, *where, pairs_P2, beta, label_smoothing, normalize)
    total_S, tokens_S = seq_logps(logprob_T, *where)
    on_device = pairs_P2.to(total_S.device)
    logps, lengths = total_S[on_device], tokens_S[on_device]
    total = loss_P.sum()
    means = {
        "loss": loss_P,
        "accuracy": reward.accuracy,
        "margin": reward.margin,
        "rewards/chosen": reward.chosen,
        "rewards/rejected": reward.rejected,
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }
    if nll_weight:
        nll_P = -logps[:, 0] / lengths[:, 0].clamp(min=1.0)
        total = total + nll_weight * nll_P.sum()
        means |= {"loss": loss_P + nll_weight * nll_P, "nll": nll_P}
    return _of_pairs(total, means, lengths)


def reward_bt(value_T: Tensor, packed: Packed) -> Loss:
    """Bradley-Terry (arXiv 2411.15124, section 6.2): total = sum over pairs of -log sigmoid(reward of chosen - reward of rejected), where
    a sequence's reward is the value of its last token; count = pairs. Pairs and metrics are those of `dpo`, without log-probs."""
    pairs_P2, cu_seqlens = _pairs(packed).to(value_T.device), packed.cu_seqlens.to(value_T.device)
    reward_P2 = value_T[cu_seqlens[1:] - 1][pairs_P2]
    length_P2 = F.pad(packed.mask_T.cumsum(0), (1, 0))[cu_seqlens].diff()[pairs_P2]
    margin_P = reward_P2[:, 0] - reward_P2[:, 1]
    loss_P = -F.logsigmoid(margin_P)
    means = {
        "loss": loss_P,
        "accuracy": margin_P > 0,
        "margin": margin_P,
        "rewards/chosen": reward_P2[:, 0],
        "rewards/rejected": reward_P2[:, 1],
    }
    return _of_pairs(loss_P.sum(), means, length_P2)


def _of_pairs(total: Tensor, means: dict[str, Tensor], length_P2: Tensor) -> Loss:
    """`means` [P] each become a mean over pairs; with them go the halves' lengths, and how far the margin follows them."""
    means = means | {"length/chosen": length_P2[:, 0], "length/rejected": length_P2[:, 1]}
    sums: dict[str, tuple[Tensor | float, int]] = {name: (value_P.detach().double().sum(), len(value_P)) for name, value_P in means.items()}
    bias = Moments.of(means["margin"].detach(), length_P2[:, 0] - length_P2[:, 1])
    return Loss(total, len(length_P2), sums, {"length_bias": bias})


def _pairs(packed: Packed) -> Tensor:
    """(chosen, rejected) of every pair of the microbatch, as places among its sequences, int64 [P, 2]."""
    place = {index: s for s, index in enumerate(packed.index_S)}
    pairs = [(place[index], place[index + 1]) for index in packed.index_S if index >= 0 and index % 2 == 0]
    assert 2 * len(pairs) == sum(index >= 0 for index in packed.index_S), "a pair is split over microbatches: give both halves one group"
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def ppo_clip(
    logprob_T: Tensor, packed: Packed, *, average: Average, clip_low: float, clip_high: float, kl: Literal["k1", "k2", "k3"], kl_coef: float
) -> Loss:
    """PPO's clipped policy loss (arXiv 1707.06347, equation 7), with kl_coef * KL(policy, reference) inside where there is a reference.

    average: "token" counts every response token alike, "sequence" every response (Tülu 3's). The microbatch has advantage_T, old_logprob_T
    and, with kl_coef, ref_logprob_T.
    """
    assert packed.advantage_T is not None
    assert packed.old_logprob_T is not None
    weight_T, count = _weights(packed, average)
    total, stats = ppo_loss(
        logprob_T,
        packed.old_logprob_T,
        packed.advantage_T,
        weight_T,
        clip_low=clip_low,
        clip_high=clip_high,
        ref_logp=packed.ref_logprob_T if kl_coef else None,
        kl=kl,
        kl_coef=kl_coef,
    )
    named = {"loss": stats.loss, "clip_fraction": stats.clip_fraction, "approx_kl": stats.approx_kl}
    return Loss(total, count, {name: (value, count) for name, value in named.items()})


def ppo_first(output_2T: Tensor, packed: Packed, *, average: Average, **how: Any) -> Loss:
    """`ppo_clip` where the policy that learns is still the one that drew: the ratio is 1, of which the gradient is left (REINFORCE's).

    output_2T are log-probs and entropies, old_logprob_T the sampler's log-probs. Metrics beside those of ppo_clip: entropy, and
    sampler_gap, |log-prob of the sampler - logprob_T|, each a mean over response tokens; sampler_gap_max.
    """
    assert packed.old_logprob_T is not None
    logprob_T, entropy_T = output_2T.unbind()
    found = ppo_clip(logprob_T, replace(packed, old_logprob_T=logprob_T.detach()), average=average, **how)
    gap_T = ((logprob_T.detach() - packed.old_logprob_T) * packed.mask_T).abs()
    tokens = int(packed.counts().sum())
    said = {"entropy": ((entropy_T * packed.mask_T).sum(), tokens), "sampler_gap": (gap_T.sum(), tokens)}
    return replace(found, metrics=found.metrics | said, maxima={"sampler_gap_max": gap_T.max()})


def ppo_terms(packed: Packed, *, average: Average, on_policy: bool = False, kl_coef: float, **how: Any) -> TokenTerms:
    """`ppo_clip` as a sum over tokens; `on_policy`: `ppo_first`."""
    weight_T, _ = _weights(packed, average)
    old_T, ref_T = None if on_policy else packed.old_logprob_T, packed.ref_logprob_T if kl_coef else None
    return TokenTerms(weight_T, packed.advantage_T, old_T, ref_T, kl_coef=kl_coef, **how)


def ppo(on_policy: bool, **how: Any) -> TokenLoss:
    """`ppo_first` where the policy that learns is the one that sampled, else `ppo_clip`; `how` are the arguments of ppo_clip."""
    return TokenLoss(partial(ppo_first if on_policy else ppo_clip, **how), partial(ppo_terms, on_policy=on_policy, **how))


def value_clip(value_T: Tensor, packed: Packed, *, average: Average, clip: float, coef: float) -> Loss:
    """The critic's clipped loss, coef * max((v - R)^2, (clip(v, v_old +- clip) - R)^2) / 2, where R is the return."""
    assert packed.value_T is not None
    assert packed.returns_T is not None
    weight_T, count = _weights(packed, average)
    total = value_loss(value_T, packed.value_T, packed.returns_T, weight_T, clip=clip)
    return Loss(coef * total, count, {"loss": (total.detach(), count)})


def _weights(packed: Packed, average: Average) -> tuple[Tensor, int]:
    """What each token's loss counts, float32 [T], and what the sum of all is divided by: response tokens, or responses."""
    mask_T, tokens_S = packed.mask_T.float(), packed.counts()
    if average == "token":
        return mask_T, int(tokens_S.sum())
    share_S = torch.where(tokens_S > 0, 1 / tokens_S.clamp_min(1).double(), 0.0).float()
    lengths_S = packed.cu_seqlens.diff().long()
    share_T = share_S.repeat_interleave(lengths_S, output_size=len(mask_T))
    return mask_T * share_T.to(mask_T.device, non_blocking=True), int((tokens_S > 0).sum())
