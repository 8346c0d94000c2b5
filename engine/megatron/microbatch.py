"""One microbatch through one stage, as megatron's schedules run it, and what becomes of the last stage's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.types import LossFunction, Packed, TokenLoss

Finish = Callable[[Packed, Tensor], tuple[Tensor, Tensor, dict[str, Any]]]  # what megatron wants of a loss: (sum, count, anything)


def forward_step(finish: Finish, packed_forwards: Iterator[Any], stage: Any) -> tuple[Tensor, Any]:
    """The next microbatch through a stage, as megatron's schedules ask for it: the output, and what to make of it at the end."""
    packed, packed_forward = next(packed_forwards)
    out = stage(packed.tokens_T[None], None, None, labels=packed.targets_T[None], packed_seq_params=packed_forward)
    return out, partial(finish, packed)


def finish_for(loss: LossFunction) -> Finish:
    """What an update makes of the output: for a TokenLoss the output layer has computed the total."""
    return partial(_finish_token_loss if isinstance(loss, TokenLoss) else finish_loss, loss)


def _finish_token_loss(loss: LossFunction, packed: Packed, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """`output` is what model._token_loss returns."""
    rows = output[1:].detach().view(-1, len(packed.tokens_T))
    _, *rest = finish_loss(loss, packed, rows[0] if len(rows) == 1 else rows)
    return output[0], *rest  # type: ignore[return-value]


def finish_loss(loss: LossFunction, packed: Packed, output_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    found = loss(output_T, packed)
    return (
        found.total,
        torch.as_tensor(found.count, dtype=torch.int),
        {"metrics": found.metrics | found.correlations, "maxima": found.maxima},
    )


def finish_per_token(packed: Packed, output_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return output_T.sum(), torch.tensor(0, dtype=torch.int), {"output": output_T.detach()}
