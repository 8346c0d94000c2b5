"""Losses: pure functions of (logprob_T or value_T, microbatch) that return sums and counts.

Only Policy.update divides, once, by the count of the whole step.
"""

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
    """Negative log-likelihood of the trained tokens: total = -sum of logprob_T where mask_T; count = number of trained tokens."""
    count = int(packed.counts().sum())
    total = -(logprob_T * packed.mask_T).sum()
    return Loss(total, count, {"loss": (total.detach(), count)})


def nll_terms(packed: Packed) -> TokenTerms:
    """The terms of `nll`, for a TokenLoss."""
    return TokenTerms(packed.mask_T.float())


SFT_LOSS = TokenLoss(nll, nll_terms)


def dpo(
    logprob_T: Tensor, packed: Packed, *, beta: float, label_smoothing: float = 0.0, normalize: bool = True, nll_weight: float = 0.0
) -> Loss:
    """Direct preference optimization: total = sum of the losses of the microbatch's pairs, count = number of pairs.

    Pair p consists of the samples 2 p (chosen) and 2 p + 1 (rejected) of the batch; ref_logprob_T comes from the reference model. See
    triton_kernels.dpo_norm for the loss, `normalize` and `label_smoothing`. `nll_weight` is the coefficient of an additional term: the
    negative log-likelihood of the chosen response, averaged over the tokens of that response (Pang et al., arXiv 2404.19733, equation 2).
    It is a sum over pairs, too. TRL's loss_type "sft" averages over all tokens of a microbatch instead: the same for one pair per
    microbatch; otherwise its value depends on the split into microbatches.

    Metrics, as means over pairs: rewards and their margin (nats times beta), accuracy (margin above 0), sums of log-probs and numbers
    of unmasked tokens of chosen and rejected. length_bias is the correlation over pairs between the margin and the difference in length
    (chosen minus rejected). While the policy equals the reference, margins are rounding errors, and so are accuracy and length_bias.
    """
    assert packed.ref_logprob_T is not None, "DPO needs ref_logprob in every sample"
    pairs_P2 = _pairs(packed)
    masked = (packed.mask_T, packed.cu_seqlens)
    loss_P, reward = dpo_norm(logprob_T, packed.ref_logprob_T, *masked, pairs_P2, beta, label_smoothing, normalize)
    total_S, tokens_S = seq_logps(logprob_T, *masked)
    on_device = pairs_P2.to(total_S.device)
    logps, lengths = total_S[on_device], tokens_S[on_device]
    total = loss_P.sum()
    means = {
        "loss": loss_P,
        "reward/accuracy": reward.accuracy,
        "reward/margin": reward.margin,
        "reward/chosen": reward.chosen,
        "reward/rejected": reward.rejected,
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }
    if nll_weight:
        nll_P = -logps[:, 0] / lengths[:, 0].clamp(min=1.0)
        total = total + nll_weight * nll_P.sum()
        means |= {"loss": loss_P + nll_weight * nll_P, "nll": nll_P}
    return _of_pairs(total, means, lengths)


def reward_bt(value_T: Tensor, packed: Packed) -> Loss:
    """Bradley-Terry loss (arXiv 2411.15124, section 6.2): total = sum over pairs of -log sigmoid(reward of chosen - reward of rejected).

    The reward of a sequence is the value at its last token; count = number of pairs. Pairs and metrics as in `dpo`, without log-probs.
    """
    pairs_P2, cu_seqlens = _pairs(packed).to(value_T.device), packed.cu_seqlens.to(value_T.device)
    reward_P2 = value_T[cu_seqlens[1:] - 1][pairs_P2]
    length_P2 = F.pad(packed.mask_T.cumsum(0), (1, 0))[cu_seqlens].diff()[pairs_P2]
    margin_P = reward_P2[:, 0] - reward_P2[:, 1]
    loss_P = -F.logsigmoid(margin_P)
    means = {
        "loss": loss_P,
        "reward/accuracy": margin_P > 0,
        "reward/margin": margin_P,
        "reward/chosen": reward_P2[:, 0],
        "reward/rejected": reward_P2[:, 1],
    }
    return _of_pairs(loss_P.sum(), means, length_P2)


def _of_pairs(total: Tensor, means: dict[str, Tensor], length_P2: Tensor) -> Loss:
    """A Loss that reports `means` (each [P]) and both lengths as means over pairs, and length_bias as a correlation."""
    means = means | {"length/chosen": length_P2[:, 0], "length/rejected": length_P2[:, 1]}
    sums: dict[str, tuple[Tensor | float, int]] = {name: (value_P.detach().double().sum(), len(value_P)) for name, value_P in means.items()}
    bias = Moments.of(means["reward/margin"].detach(), length_P2[:, 0] - length_P2[:, 1])
    return Loss(total, len(length_P2), sums, {"reward/length_bias": bias})


def _pairs(packed: Packed) -> Tensor:
    """Indices (chosen, rejected) of every pair among the microbatch's sequences, int64 [P, 2]."""
    place = {index: s for s, index in enumerate(packed.index_S)}
    pairs = [(place[index], place[index + 1]) for index in packed.index_S if index >= 0 and index % 2 == 0]
    assert 2 * len(pairs) == sum(index >= 0 for index in packed.index_S), (
        "a pair is split over microbatches: give both of its samples the same group"
    )
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def ppo_clip(
    logprob_T: Tensor,
    packed: Packed,
    *,
    average: Average | int,
    clip_low: float,
    clip_high: float,
    kl: Literal["k1", "k2", "k3"],
    kl_coef: float,
) -> Loss:
    """PPO's clipped policy loss (arXiv 1707.06347, equation 7), plus kl_coef * KL(policy, reference).

    average: "token" weights all response tokens equally, "sequence" all responses, and a number n all groups of n consecutive samples
    of the batch, whose tokens are weighted equally within the group (Tülu 3's trainer, n responses per device). A group must not be split
    over microbatches. The microbatch needs advantage_T, old_logprob_T and, unless kl_coef is 0, ref_logprob_T.
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


def ppo_first(output_2T: Tensor, packed: Packed, *, average: Average | int, **options: Any) -> Loss:
    """`ppo_clip` for responses of the current weights: the ratio is 1, and its gradient is that of REINFORCE.

    output_2T: log-probs and entropies. old_logprob_T: the sampler's log-probs. Metrics in addition to those of ppo_clip, as means over
    response tokens: entropy, and rollout/logprob_diff = |log-prob of the sampler - logprob_T|; rollout/logprob_diff_max is its maximum.
    """
    assert packed.old_logprob_T is not None
    logprob_T, entropy_T = output_2T.unbind()
    loss = ppo_clip(logprob_T, replace(packed, old_logprob_T=logprob_T.detach()), average=average, **options)
    gap_T = ((logprob_T.detach() - packed.old_logprob_T) * packed.mask_T).abs()
    tokens = int(packed.counts().sum())
    metrics = {"entropy": ((entropy_T * packed.mask_T).sum(), tokens), "rollout/logprob_diff": (gap_T.sum(), tokens)}
    return replace(loss, metrics=loss.metrics | metrics, maxima={"rollout/logprob_diff_max": gap_T.max()})


def ppo_terms(packed: Packed, *, average: Average | int, on_policy: bool = False, kl_coef: float, **options: Any) -> TokenTerms:
    """`ppo_clip` as a sum over tokens; `on_policy`: `ppo_first`."""
    weight_T, _ = _weights(packed, average)
    old_T, ref_T = None if on_policy else packed.old_logprob_T, packed.ref_logprob_T if kl_coef else None
    return TokenTerms(weight_T, packed.advantage_T, old_T, ref_T, kl_coef=kl_coef, **options)


def ppo(on_policy: bool, **options: Any) -> TokenLoss:
    """`ppo_first` if the current weights sampled the responses, else `ppo_clip`; `options` are the arguments of ppo_clip."""
    return TokenLoss(partial(ppo_first if on_policy else ppo_clip, **options), partial(ppo_terms, on_policy=on_policy, **options))


def value_clip(value_T: Tensor, packed: Packed, *, average: Average | int, clip: float, coef: float, score_slot: bool = False) -> Loss:
    """PPO's clipped value loss: coef * max((v - R)^2, (clip(v, v_old +- clip) - R)^2) / 2, with the return R.

    `average` as in `ppo_clip`. score_slot: the last position of each sample is trained as well; see advantages.by_critic.
    """
    assert packed.value_T is not None
    assert packed.returns_T is not None
    weight_T, count = _weights(_with_score_slots(packed) if score_slot else packed, average)
    total = value_loss(value_T, packed.value_T, packed.returns_T, weight_T, clip=clip)
    return Loss(coef * total, count, {"loss": (total.detach(), count)})


def _with_score_slots(packed: Packed) -> Packed:
    """The microbatch with mask 1 at the last position of each of its samples. Counting its tokens synchronizes with the device."""
    ends = [end - 1 for index, end in zip(packed.index_S, packed.cu_seqlens[1:].tolist(), strict=True) if index >= 0]
    mask_T = packed.mask_T.clone()
    mask_T[torch.tensor(ends, dtype=torch.int64, device=mask_T.device)] = True
    return replace(packed, mask_T=mask_T, counted_S=None)


def _weights(packed: Packed, average: Average | int) -> tuple[Tensor, int]:
    """Weight of each token's loss, float32 [T], and the denominator of their sum: number of response tokens, or of groups of responses."""
    mask_T, tokens_S = packed.mask_T.float(), packed.counts()
    if average == "token":
        return mask_T, int(tokens_S.sum())
    size = 1 if average == "sequence" else average
    _, group_S = (
        torch.tensor(packed.index_S, dtype=torch.int64).div(size, rounding_mode="floor").unique(return_inverse=True)
    )  # -1: all padding
    tokens_G = tokens_S.new_zeros(len(group_S)).index_add(0, group_S, tokens_S)
    share_G = torch.where(tokens_G > 0, 1 / tokens_G.clamp_min(1).double(), 0.0).float()
    lengths_S = packed.cu_seqlens.diff().long()
    share_T = share_G[group_S].repeat_interleave(lengths_S, output_size=len(mask_T))
    return mask_T * share_T.to(mask_T.device, non_blocking=True), int((tokens_G > 0).sum())
