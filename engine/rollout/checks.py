"""Whether generation fits a launch, as far as settings can tell."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.checks import Launch, check_generation
from engine.rollout.sampler import Slotting


def generation_problems(launch: Launch, slotting: Slotting, positions: int) -> Iterator[str]:
    """Why sequences of `positions` tokens, prompt and response, cannot be drawn."""
    model, grid = launch.model, launch.run.parallel
    try:
        slotting.held(model.cache_bytes(grid.most_layers(model), grid.tp, positions, launch.itemsize), positions, grid.pp)
    except ValueError as error:
        yield f"algorithm.rollout.{error}"
    try:
        if launch.on_gpu:
            check_generation(grid)
    except ValueError as error:
        yield str(error)


def slot_warnings(launch: Launch, slotting: Slotting, responses: int) -> Iterator[str]:
    """What is lost by the number of slots, when a step draws so many responses."""
    slots, pp, tp = slotting.slots, launch.run.parallel.pp, launch.run.parallel.tp
    replicas = slotting.gpus // (pp * tp) or launch.dp
    most = max(pp * tp, -(-responses // replicas))
    even = max(1, min(slots, most) // (pp * tp)) * pp * tp
    if slots > most:
        yield f"algorithm.rollout.slots={slots} is more than the {most} responses that a replica draws; use {even}"
    elif slots % (pp * tp):
        yield (
            f"algorithm.rollout.slots={slots} makes {max(1, slots // pp)} for each of parallel.pp={pp} stages, padded to a multiple of "
            f"parallel.tp={tp} whenever they draw; use {even}"
        )
