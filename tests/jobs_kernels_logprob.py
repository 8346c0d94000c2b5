"""What the tests of log-probs run on ranks: the vocabulary cut over the world."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.world import World
from triton_kernels import linear_logprob, logprob


def group_name() -> str:
    assert dist.group.WORLD is not None
    return dist.group.WORLD.group_name


def sharded_logprob(world: World, hidden: Tensor, weight: Tensor, target: Tensor, valid: int, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """linear_logprob: log-probs, this rank's part of hidden's gradient, its shard's gradient."""
    shard = padded // world.size
    mine = F.pad(weight, (0, 0, 0, padded - valid))[world.rank * shard :][:shard].clone().requires_grad_()
    hidden = hidden.clone().requires_grad_()
    got, _, _ = linear_logprob(hidden, mine, target, group=group_name(), vocab_start=world.rank * shard, vocab_valid=valid, chunk=8)
    got.sum().backward()
    assert hidden.grad is not None
    assert mine.grad is not None
    return got.detach(), hidden.grad, mine.grad


def sharded_rows(world: World, logits: Tensor, target: Tensor, upstream: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """logprob: (logp, entropy, lse) stacked [3, N], and the gradient of this rank's columns for `upstream` [3, N]."""
    width = logits.shape[1] // world.size
    mine = logits[:, world.rank * width :][:, :width].clone().requires_grad_()
    logp, entropy, lse = logprob(mine, target, group=group_name(), vocab_start=world.rank * width, entropy=True, **how)
    assert entropy is not None
    found = torch.stack((logp, entropy, lse))
    (found * upstream).sum().backward()
    assert mine.grad is not None
    return found.detach(), mine.grad


def misplaced(world: World) -> str:
    """What is said where a rank's columns do not start where its rank says."""
    try:
        logprob(torch.zeros(1, 4), torch.tensor([0]), group=group_name(), vocab_start=1 + world.rank * 4)
    except ValueError as error:
        return str(error)
    return ""
