"""The forward-step function that megatron's schedules call for each microbatch, and the loss functions in the form they expect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.types import LossFunction, Packed, TokenLoss

# megatron's form of a loss: -> (sum, count, dict that the schedule returns)
Finish = Callable[[Packed, Tensor], tuple[Tensor, Tensor, dict[str, Any]]]


def forward_step(finish: Finish, packed_forwards: Iterator[Any], stage: Any) -> tuple[Tensor, Any]:
    """Run the next microbatch through a stage. Returns its output and the function that the last stage applies to it."""
    packed, packed_forward = next(packed_forwards)
    out = stage(packed.tokens_T[None], None, None, labels=packed.targets_T[None], packed_seq_params=packed_forward)
    return out, partial(finish, packed)


def finish_for(loss: LossFunction) -> Finish:
    """The Finish of an update. For a TokenLoss, the total was computed by the output layer."""
    return partial(_finish_token_loss if isinstance(loss, TokenLoss) else finish_loss, loss)


def _finish_token_loss(loss: LossFunction, packed: Packed, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """`output` is what model._token_loss returns."""
    rows = output[1:].detach().view(-1, len(packed.tokens_T))
    _, *rest = finish_loss(loss, packed, rows[0] if len(rows) == 1 else rows)
    return output[0], *rest  # type: ignore[return-value]


def finish_loss(loss: LossFunction, packed: Packed, output_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    result = loss(output_T, packed)
    return (
        result.total,
        torch.as_tensor(result.count, dtype=torch.int),
        {"metrics": result.metrics | result.correlations, "maxima": result.maxima},
    )


def finish_per_token(packed: Packed, output_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return output_T.sum(), torch.tensor(0, dtype=torch.int), {"output": output_T.detach()}
