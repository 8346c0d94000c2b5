"""Losses: pure functions of (logprob_T or value_T, microbatch) that return sums and counts. Only the policy divides, once, over the whole
step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.types import Loss, Packed

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
