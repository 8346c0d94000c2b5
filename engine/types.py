"""The five nouns that travel through the engine, and the letters their shapes are written in.

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
    """A question that a policy is asked, with what a verifier needs to judge the answer."""

    tokens: np.ndarray  # int32 [L]
    truth: Any = None
    verifier: str = ""
    id: int = 0


@dataclass(frozen=True)
class Sample:
    """One training sequence on the host. Position t predicts tokens[t + 1]; mask[t] says whether that prediction counts."""

    tokens: np.ndarray  # int32 [L + 1]
    mask: np.ndarray  # uint8 [L]
    group: int = -1  # samples of one group (a DPO pair) share a microbatch; -1: on its own
    reward: float | None = None
    advantage: np.ndarray | None = None  # float32 [L], and so the rest
    old_logprob: np.ndarray | None = None
    ref_logprob: np.ndarray | None = None
    value: np.ndarray | None = None
    returns: np.ndarray | None = None  # what a critic should have said
    entropy: np.ndarray | None = None  # of the distribution each token was drawn from, in nats: to be told, not learned from
    version: int = 0  # the optimizer step whose weights sampled it

    @property
    def length(self) -> int:
        """L, the number of predicted tokens: what a token budget counts."""
        return len(self.tokens) - 1


@dataclass
class Packed:
    """One microbatch: S sequences laid end to end. Padding is a sequence of its own, masked, with index -1: the last, and where sequences
    are padded one by one, one behind each. Ids are int32 on the host, where they lie and from where they are copied, int64 after `to`."""

    tokens_T: torch.Tensor  # int32, int64
    targets_T: torch.Tensor  # int32, int64; tokens shifted by one within each sequence
    positions_T: torch.Tensor  # int32, int64; from 0 in each sequence
    mask_T: torch.Tensor  # bool
    cu_seqlens: torch.Tensor  # int32 [S + 1], always on the host: lengths are data, and attention reads them there
    index_S: tuple[int, ...]  # which sample of the batch each sequence is
    advantage_T: torch.Tensor | None = None  # float32, and so the rest
    old_logprob_T: torch.Tensor | None = None
    ref_logprob_T: torch.Tensor | None = None
    value_T: torch.Tensor | None = None
    returns_T: torch.Tensor | None = None
    counted_S: torch.Tensor | None = None  # int64, on the host: see `counts`

    def counts(self) -> torch.Tensor:
        """How many tokens of each sequence the mask counts, int64 [S] on the host. After `to` nobody waits for the device to know it."""
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
        """The same microbatch with masked tokens added behind it, so that T is `total`."""
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


Step = list[Packed]  # the microbatches of one rank for one optimizer step; every data-parallel rank has equally many


class Moments(NamedTuple):
    """Sums over n points (x, y): what a correlation is made of, and what can be added over microbatches and ranks."""

    n: torch.Tensor | float
    x: torch.Tensor | float
    y: torch.Tensor | float
    xx: torch.Tensor | float
    yy: torch.Tensor | float
    xy: torch.Tensor | float

    @staticmethod
    def of(x: torch.Tensor, y: torch.Tensor) -> Moments:
        """Of two vectors, in float64."""
        x, y = x.double(), y.double()
        return Moments(len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y)

    def correlation(self) -> float:
        """Pearson's, in [-1, 1]; 0 where x or y does not vary. For moments that are plain numbers."""
        n, x, y, xx, yy, xy = (float(value) for value in self)
        spread = max(n * xx - x * x, 0.0) * max(n * yy - y * y, 0.0)
        return (n * xy - x * y) / math.sqrt(spread) if spread > 0 else 0.0


@dataclass(frozen=True)
class Loss:
    """What a loss function says of one microbatch: sums and counts, so that no number depends on how a batch was cut."""

    total: torch.Tensor  # scalar, differentiable: a SUM
    count: int  # what the total of the whole step is divided by, summed over microbatches and ranks
    metrics: dict[str, tuple[torch.Tensor | float, int]]  # name -> (sum, count)
    correlations: dict[str, Moments] = field(default_factory=dict)  # what a mean cannot tell; reported beside the metrics
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> the largest, which is reported beside the metrics too


LossFunction = Callable[[torch.Tensor, Packed], Loss]  # (logprob_T, or value_T of a scalar head; microbatch) -> Loss


@dataclass(frozen=True)
class TokenTerms:
    """A loss that is a sum over tokens, each term a function of its token's log-prob: the arguments of linear_policy_loss that say which.
    Tensors are float32 [T]; without advantage_T the loss is the negative log-likelihood."""

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
    """A loss function whose gradient the output layer can make while it has the logits: `terms` of a microbatch on the device say how.

    An update takes the total from the output layer and the counts and metrics from `loss`; the total of `loss` is not used there.
    """

    loss: LossFunction
    terms: Callable[[Packed], TokenTerms]

    def __call__(self, output: torch.Tensor, packed: Packed) -> Loss:
        return self.loss(output, packed)
