"""Jobs of the log-prob tests: a vocabulary sharded over the world, and the engine's output layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.batching.build import batch
from engine.config import Model, Parallel
from engine.distributed.world import World
from engine.losses import SFT_LOSS
from tests.support.jobs import OPTIM, samples
from triton_kernels import linear_logprob, linear_policy_loss, logprob


def group_name() -> str:
    assert dist.group.WORLD is not None
    return dist.group.WORLD.group_name


def sharded_logprob(world: World, hidden: Tensor, weight: Tensor, target: Tensor, valid: int, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """linear_logprob: log-probs, this rank's part of the gradient of hidden, and the gradient of its shard."""
    hidden, mine, options = _shard(world, hidden, weight, valid, padded)
    actual, _, _ = linear_logprob(hidden, mine, target, **options)
    grad_hidden, grad_weight = torch.autograd.grad(actual.sum(), (hidden, mine))
    return actual.detach(), grad_hidden, grad_weight


def sharded_policy_loss(
    world: World, hidden: Tensor, weight: Tensor, target: Tensor, token_weight: Tensor, valid: int, padded: int
) -> tuple[Tensor, Tensor, Tensor]:
    """linear_policy_loss: the total loss, and the same gradients."""
    hidden, mine, options = _shard(world, hidden, weight, valid, padded)
    total, _, _ = linear_policy_loss(hidden, mine, target, token_weight, **options)
    grad_hidden, grad_weight = torch.autograd.grad(total, (hidden, mine))
    return total.detach(), grad_hidden, grad_weight


def _shard(world: World, hidden: Tensor, weight: Tensor, valid: int, padded: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Leaf tensors of hidden and of this rank's rows of the padded weight, and the Shard."""
    size = padded // world.size
    start = world.rank * size
    mine = F.pad(weight, (0, 0, 0, padded - valid))[start:][:size].clone().requires_grad_()
    return hidden.clone().requires_grad_(), mine, {"group": group_name(), "vocab_start": start, "vocab_valid": valid, "chunk": 8}


def sharded_rows(world: World, logits: Tensor, target: Tensor, upstream: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """logprob: (logp, entropy, lse) stacked [3, N], and the gradient of this rank's columns for `upstream` [3, N]."""
    width = logits.shape[1] // world.size
    mine = logits[:, world.rank * width :][:, :width].clone().requires_grad_()
    logp, entropy, lse = logprob(mine, target, group=group_name(), vocab_start=world.rank * width, entropy=True, **options)
    assert entropy is not None
    results = torch.stack((logp, entropy, lse))
    (results * upstream).sum().backward()
    assert mine.grad is not None
    return results.detach(), mine.grad


def misplaced(world: World) -> str:
    """The error if a rank's columns do not start where its rank implies."""
    try:
        logprob(torch.zeros(1, 4), torch.tensor([0]), group=group_name(), vocab_start=1 + world.rank * 4)
    except ValueError as error:
        return str(error)
    return ""


def peak_bytes(work: Callable[[], object]) -> int:
    """The peak bytes allocated by `work`."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    recorded: Any = profile.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def output_layer(world: World, parallel: Parallel, model: Model) -> tuple[list[bool], int, int]:
    """For a step of three microbatches, on the last stage: whether each added the output layer's gradient to main_grad; the peak bytes
    allocated by the step; the bytes of main_grad."""
    from engine.megatron.policy import Policy

    optim = replace(OPTIM, max_grad_norm=0.0)  # on CPU, clipping copies the gradients
    with closing(Policy(model, optim, parallel, world)) as policy:
        batch_ = samples(0, count=6, longest=4)
        step = [packed for i in range(0, 6, 2) for packed in batch(batch_[i : i + 2], 64, **policy.batch_options)]
        policy.update(step, SFT_LOSS, optim.lr)  # warm-up: one-time allocations
        with mock.patch("engine.megatron.model.linear_policy_loss", wraps=linear_policy_loss) as called:
            peak = peak_bytes(lambda: policy.update(step, SFT_LOSS, optim.lr))
        if not policy.is_replica_writer:
            return [], 0, 0
        weight: Any = policy.chunks[-1].shared_embedding_or_output_weight()
        results = [call.kwargs["weight_grad"] is weight.main_grad for call in called.call_args_list]
        return results, peak, weight.main_grad.nbytes
