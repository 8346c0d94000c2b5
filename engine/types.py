"""The engine's data types and the letters used in shapes.

    T  tokens of a microbatch          L  predicted tokens of one sequence (it holds L + 1 ids)
    S  sequences of a microbatch       D  hidden size          V  vocabulary shard of a rank
    H  attention heads                 K  size of a head       G  samples of one prompt

Prompt -> Sample (one sequence, host memory) -> Packed (one microbatch, device memory) -> Step (one optimizer step of a rank)
-> Loss (a sum and a count, never a mean).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt, with what a verifier needs to judge a response to it."""

    tokens: np.ndarray  # int32 [L]
    truth: Any = None  # ground truth, in the format of the verifier
    verifier: str = ""  # a name in engine.verify.VERIFIERS
    id: int = 0


@dataclass(frozen=True)
class Sample:
    """One training sequence in host memory. Position t predicts tokens[t + 1]; mask[t] is 1 if that prediction enters the loss."""

    tokens: np.ndarray  # int32 [L + 1]
    mask: np.ndarray  # uint8 [L]
    group: int = -1  # samples of one group (a DPO pair) share a microbatch; -1: no group
    reward: float | None = None
    advantage: np.ndarray | None = None  # float32 [L], like the following arrays
    old_logprob: np.ndarray | None = None
    ref_logprob: np.ndarray | None = None
    value: np.ndarray | None = None
    returns: np.ndarray | None = None  # regression target of the critic
    entropy: np.ndarray | None = None  # of the distribution that each token was sampled from, in nats; a metric only
    version: int = 0  # the optimizer step whose weights sampled it

    @property
    def length(self) -> int:
        """L, the number of predicted tokens. Token budgets count these."""
        return len(self.tokens) - 1


@dataclass
class Packed:
    """One microbatch: S sequences, concatenated.

    Padding is a separate, masked sequence with index -1: the last one, or one after each sequence where sequences are padded individually.
    Ids are int32 in host memory and become int64 in `to`.
    """

    tokens_T: torch.Tensor  # int32, int64
    targets_T: torch.Tensor  # int32, int64; tokens shifted by one within each sequence
    positions_T: torch.Tensor  # int32, int64; from 0 in each sequence
    mask_T: torch.Tensor  # bool
    cu_seqlens: torch.Tensor  # int32 [S + 1], always on the host, where attention reads the lengths
    index_S: tuple[int, ...]  # index of each sequence's sample in the batch; -1: padding
    advantage_T: torch.Tensor | None = None  # float32, like the following tensors
    old_logprob_T: torch.Tensor | None = None
    ref_logprob_T: torch.Tensor | None = None
    value_T: torch.Tensor | None = None
    returns_T: torch.Tensor | None = None
    counted_S: torch.Tensor | None = None  # int64, on the host: see `counts`

    def counts(self) -> torch.Tensor:
        """Number of unmasked tokens of each sequence, int64 [S] on the host. Does not synchronize with the device after `to`."""
        if self.counted_S is not None:
            return self.counted_S
        before = torch.nn.functional.pad(self.mask_T.cumsum(0), (1, 0))
        return before[self.cu_seqlens.to(before.device).long()].diff().cpu()

    def to(self, device: torch.device) -> Packed:
        """The same microbatch with its token tensors on `device`, ids as int64; cu_seqlens stays on the host."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if f.name.endswith("_T") and (value := getattr(self, f.name)) is not None
        }
        moved |= {name: value.long() for name, value in moved.items() if value.dtype == torch.int32}
        return Packed(**{**self.__dict__, **moved, "counted_S": self.counts()})

    def padded(self, total: int) -> Packed:
        """The same microbatch, padded at the end with masked tokens to T = `total`."""
        extra = total - len(self.tokens_T)
        if extra == 0:
            return self
        longer = {
            f.name: torch.nn.functional.pad(value, (0, extra))
            for f in fields(self)
            if f.name.endswith("_T") and (value := getattr(self, f.name)) is not None
        }
        longer["positions_T"][-extra:] = torch.arange(extra)
        cu_seqlens = torch.cat([self.cu_seqlens, self.cu_seqlens.new_tensor([total])])
        return Packed(**{**self.__dict__, **longer, "cu_seqlens": cu_seqlens, "index_S": (*self.index_S, -1), "counted_S": None})


Step = list[Packed]  # the microbatches of one rank for one optimizer step; every data-parallel rank has the same number


class Moments(NamedTuple):
    """Sums over n points (x, y), from which a correlation is computed. They can be added over microbatches and ranks."""

    n: torch.Tensor | float
    x: torch.Tensor | float
    y: torch.Tensor | float
    xx: torch.Tensor | float
    yy: torch.Tensor | float
    xy: torch.Tensor | float

    @staticmethod
    def of(x: torch.Tensor, y: torch.Tensor) -> Moments:
        """Moments of two vectors of the same length, in float64."""
        x, y = x.double(), y.double()
        return Moments(len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y)

    def correlation(self) -> float:
        """Pearson correlation in [-1, 1]; 0 where x or y is constant. The moments must be plain numbers, not tensors."""
        n, x, y, xx, yy, xy = (float(value) for value in self)
        spread = max(n * xx - x * x, 0.0) * max(n * yy - y * y, 0.0)
        return (n * xy - x * y) / math.sqrt(spread) if spread > 0 else 0.0


@dataclass(frozen=True)
class Loss:
    """Result of a loss function for one microbatch: sums and counts, independent of how a batch is split into microbatches."""

    total: torch.Tensor  # scalar, differentiable: a SUM
    count: int  # denominator of the step: summed over microbatches and ranks, it divides the sum of totals
    metrics: dict[str, tuple[torch.Tensor | float, int]]  # name -> (sum, count)
    correlations: dict[str, Moments] = field(default_factory=dict)  # name -> moments; reported with the metrics
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> maximum; reported with the metrics


LossFunction = Callable[[torch.Tensor, Packed], Loss]  # (logprob_T, or value_T of a scalar head; microbatch) -> Loss


@dataclass(frozen=True)
class TokenTerms:
    """Arguments of linear_policy_loss for a loss that is a sum over tokens, each term a function of its token's log-prob.

    Tensors are float32 [T]. Without advantage_T the loss is the negative log-likelihood.
    """

    weight_T: torch.Tensor
    advantage_T: torch.Tensor | None = None
    old_logprob_T: torch.Tensor | None = None  # None: the ratio is 1
    ref_logprob_T: torch.Tensor | None = None
    clip_low: float = 0.0
    clip_high: float = 0.0
    kl: Literal["k1", "k2", "k3"] = "k3"
    kl_coef: float = 0.0


@dataclass(frozen=True)
class TokenLoss:
    """A loss function whose gradient the output layer can compute together with the logits, from `terms` of the microbatch on the device.

    An update takes the total from the output layer, and the counts and metrics from `loss`; the total of `loss` is not used.
    """

    loss: LossFunction
    terms: Callable[[Packed], TokenTerms]

    def __call__(self, output: torch.Tensor, packed: Packed) -> Loss:
        return self.loss(output, packed)
