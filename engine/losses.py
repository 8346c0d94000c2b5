"""Losses: pure functions of (logprob_T, microbatch) that return sums and counts. Only the policy divides, once, over the whole step."""

from __future__ import annotations

from torch import Tensor

from engine.types import Loss, Packed


def nll(logprob_T: Tensor, packed: Packed) -> Loss:
    """Negative log-likelihood of the trained tokens: total = -sum of logprob_T where mask_T; count = how many they are."""
    count = int(packed.mask_T.sum())
    total = -(logprob_T * packed.mask_T).sum()
    return Loss(total, count, {"loss": (total.detach(), count)})
