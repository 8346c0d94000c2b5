"""Jobs about foreign files: what a rank says of a folder that it must not use."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from engine.config import Model, Parallel
from engine.distributed.world import World
from tests.support.jobs import OPTIM


def refusal(world: World, parallel: Parallel, model: Model, out: Path | None = None) -> str:
    """Why `model`, or the newest checkpoint under `out`, is refused on this rank; "" if it loads."""
    from engine.megatron.policy import Policy

    try:
        with closing(Policy(model, OPTIM if out else None, parallel, world)) as policy:
            if out:
                policy.load_latest(out)
    except ValueError as error:
        return str(error)
    return ""


def save_infinite(world: World, parallel: Parallel, model: Model, out: Path) -> None:
    """Save a checkpoint with an infinite weight."""
    from engine.megatron.policy import Policy

    with closing(Policy(model, OPTIM, parallel, world)) as policy:
        dict(policy.chunks[0].named_parameters())["decoder.final_layernorm.weight"].data[3] = float("inf")
        policy.save(out, 1)
