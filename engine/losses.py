"""Losses: pure functions of (logprob_T or value_T, microbatch) that return sums and counts. Only the policy divides, once, over the whole
step."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.types import Loss, Packed
from triton_kernels import ppo_loss, value_loss

Average = Literal["token", "sequence"]
HALVES = ("chosen", "rejected")  # of a pair, in this order


def nll(logprob_T: Tensor, packed: Packed) -> Loss:
    """Negative log-likelihood of the trained tokens: total = -sum of logprob_T where mask_T; count = how many they are."""
    count = int(packed.mask_T.sum())
    total = -(logprob_T * packed.mask_T).sum()
    return Loss(total, count, {"loss": (total.detach(), count)})


def reward_bt(value_T: Tensor, packed: Packed) -> Loss:
    """Bradley-Terry (arXiv 2411.15124, section 6.2): total = sum over pairs of -log sigmoid(reward of chosen - reward of rejected), where
    a sequence's reward is the value of its last token; count = pairs, paired as `pairs` says."""
    pairs_P2 = pairs(packed)
    cu_seqlens = packed.cu_seqlens.to(value_T.device)
    reward_P2 = value_T[cu_seqlens[1:] - 1][pairs_P2]
    margin_P = reward_P2[:, 0] - reward_P2[:, 1]
    total = -F.logsigmoid(margin_P).sum()
    length_P2 = F.pad(packed.mask_T.cumsum(0), (1, 0))[cu_seqlens].diff()[pairs_P2]
    sums = {
        "loss": total.detach(),
        "accuracy": (margin_P > 0).sum(),
        "margin": margin_P.detach().sum(),
        **{f"reward_{half}": reward_P2[:, i].detach().sum() for i, half in enumerate(HALVES)},
        **{f"length_{half}": length_P2[:, i].sum() for i, half in enumerate(HALVES)},
    }
    return Loss(total, len(pairs_P2), {name: (value, len(pairs_P2)) for name, value in sums.items()})


def pairs(packed: Packed) -> Tensor:
    """Which sequences of the microbatch are the (chosen, rejected) of each pair, int64 [P, 2]: samples 2p and 2p + 1 of the batch."""
    place = {index: s for s, index in enumerate(packed.index_S)}
    found = [(place[index], place[index + 1]) for index in place if index >= 0 and index % 2 == 0]
    return torch.tensor(found, dtype=torch.int64).view(-1, 2)


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


def value_clip(value_T: Tensor, packed: Packed, *, average: Average, clip: float, coef: float) -> Loss:
    """The critic's clipped loss, coef * max((v - R)^2, (clip(v, v_old +- clip) - R)^2) / 2, where R is the return."""
    assert packed.value_T is not None
    assert packed.returns_T is not None
    weight_T, count = _weights(packed, average)
    total = value_loss(value_T, packed.value_T, packed.returns_T, weight_T, clip=clip)
    return Loss(coef * total, count, {"loss": (total.detach(), count)})


def _weights(packed: Packed, average: Average) -> tuple[Tensor, int]:
    """What each token's loss counts, float32 [T], and what the sum of all is divided by: response tokens, or responses."""
    mask_T = packed.mask_T.float()
    if average == "token":
        return mask_T, int(packed.mask_T.sum())
    cu_seqlens = packed.cu_seqlens.to(mask_T.device).long()
    tokens_S = F.pad(mask_T.double().cumsum(0), (1, 0))[cu_seqlens].diff()
    share_S = torch.where(tokens_S > 0, 1 / tokens_S.clamp_min(1), 0.0).float()
    lengths_S = cu_seqlens.diff()
    return mask_T * share_S.repeat_interleave(lengths_S, output_size=len(mask_T)), int((tokens_S > 0).sum())
