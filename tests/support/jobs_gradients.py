"""Jobs of the gradient tests."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

from torch import Tensor

from engine.batching.build import batch
from engine.config import Model, Parallel
from engine.distributed.world import World
from engine.losses import nll
from engine.types import Loss, Packed
from tests.support import jobs


def main_grads(world: World, parallel: Parallel, model: Model, *, fused: bool) -> tuple[dict[str, list[float]], int]:
    """The gradients of this rank's weights after a step of several microbatches with a learning rate of 0, and the number of linear layers
    with fused accumulation."""
    from engine.megatron.policy import Policy

    with closing(Policy(model, replace(jobs.OPTIM, max_grad_norm=0.0), parallel, world)) as policy:
        layers = [m for chunk in policy.chunks for m in chunk.modules() if getattr(m, "gradient_accumulation_fusion", False)]
        for layer in layers if not fused else ():
            layer.gradient_accumulation_fusion = False  # type: ignore[assignment]
        loss = squares if policy.model.head == "scalar" else nll
        policy.update(batch(jobs.samples(0), 64, **policy.batch_options), loss, 0.0)
        named = [(f"{i} {name}", p) for i, chunk in enumerate(policy.chunks) for name, p in chunk.named_parameters()]
        return {name: p.main_grad.flatten().tolist() for name, p in named}, len(layers)  # type: ignore[attr-defined]


def squares(value_T: Tensor, packed: Packed) -> Loss:
    total, count = (0.5 * (value_T - 1) ** 2 * packed.mask_T).sum(), int(packed.mask_T.sum())
    return Loss(total, count, {"loss": (total.detach(), count)})


def read_only_gradients(world: World, parallel: Parallel, model: Model, *, frozen: str = "") -> dict[str, Any]:
    """Gradients from autograd of a policy without an optimizer; weights with `frozen` in their name are frozen. Name -> sum, or None."""
    from engine.megatron.policy import Policy

    with closing(Policy(model, None, parallel, world)) as policy:
        (chunk,) = policy.chunks
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(not frozen or frozen not in name)
        packed, packed_forward = policy._packed_forward(batch(jobs.samples(0, 4), 128, **policy.batch_options)[0])
        out = chunk(packed.tokens_T[None], None, None, labels=packed.targets_T[None], packed_seq_params=packed_forward)
        out.sum().backward()
        return {name: None if p.grad is None else float(p.grad.double().abs().sum()) for name, p in chunk.named_parameters()}
