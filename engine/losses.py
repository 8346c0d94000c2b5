"""Losses: pure functions of (logprob_T or value_T, microbatch) that return sums and counts. Only the policy divides, once, over the whole
step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.types import Loss, Packed


def nll(logprob_T: Tensor, packed: Packed) -> Loss:
    """Negative log-likelihood of the trained tokens: total = -sum of logprob_T where mask_T; count = how many they are."""
    count = int(packed.mask_T.sum())
    total = -(logprob_T * packed.mask_T).sum()
    return Loss(total, count, {"loss": (total.detach(), count)})


def reward_bt(value_T: Tensor, packed: Packed) -> Loss:
    """Bradley-Terry (arXiv 2411.15124, section 6.2): total = sum over pairs of -log sigmoid(reward of chosen - reward of rejected), where
    a sequence's reward is the value of its last token; count = pairs.

    A pair is the samples 2 p (chosen) and 2 p + 1 (rejected) of the batch. Metrics with a mean over pairs: rewards and their margin,
    accuracy (margin above 0), numbers of counted tokens of both halves.
    """
    pairs_P2 = _pairs(packed).to(value_T.device)
    cu_seqlens = packed.cu_seqlens.to(value_T.device)
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
        "length/chosen": length_P2[:, 0],
        "length/rejected": length_P2[:, 1],
    }
    count = len(pairs_P2)
    return Loss(loss_P.sum(), count, {name: (value_P.detach().double().sum(), count) for name, value_P in means.items()})


def _pairs(packed: Packed) -> Tensor:
    """(chosen, rejected) of every pair of the microbatch, as places among its sequences, int64 [P, 2]."""
    place = {index: s for s, index in enumerate(packed.index_S)}
    pairs = [(place[index], place[index + 1]) for index in packed.index_S if index >= 0 and index % 2 == 0]
    assert 2 * len(pairs) == sum(index >= 0 for index in packed.index_S), "a pair is split over microbatches: give both halves one group"
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
