"""Launch checks for generation, from settings and model shapes alone."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config import Parallel
from engine.config.checks import Launch, check_generation
from engine.rollout.config import RolloutConfig


def generation_problems(launch: Launch, rollout: RolloutConfig, positions: int) -> Iterator[str]:
    """Why sequences of `positions` tokens, prompt and response, cannot be generated."""
    model, grid = launch.model, launch.run.parallel
    try:
        rollout.max_cached_seqs(model.kv_cache_bytes(grid.most_layers(model), grid.tp, positions, launch.itemsize), positions, grid.pp)
    except ValueError as error:
        yield f"algorithm.{error}"
    try:
        if launch.on_gpu:
            check_generation(grid)
    except ValueError as error:
        yield str(error)


def batch_size_warnings(launch: Launch, rollout: RolloutConfig, responses: int) -> Iterator[str]:
    """Warn when `max_num_seqs` wastes memory or compute for `responses` responses per step."""
    parallel = launch.run.parallel
    slots, pp, tp, unit = rollout.max_num_seqs, parallel.pp, parallel.tp, parallel.model_ranks
    replicas = rollout.generator_gpus // unit or launch.dp
    most = max(unit, -(-responses // replicas))
    even = max(1, min(slots, most) // unit) * unit
    if slots > most:
        yield f"algorithm.rollout.max_num_seqs={slots} is more than the {most} responses that a replica generates; use {even}"
    elif slots % unit:
        yield (
            f"algorithm.rollout.max_num_seqs={slots} makes {max(1, slots // pp)} for each of parallel.pp={pp} stages, padded to a multiple "
            f"of parallel.tp={tp} in each decode step; use {even}"
        )


def training_ranks(parallel: Parallel, size: int, gpus: int) -> int:
    """The number of `size` ranks that train. Raises ValueError if the `gpus` generators are not whole replicas or leave no trainer."""
    ranks = parallel.model_ranks
    if not gpus:
        return size
    if gpus % ranks:
        raise ValueError(
            f"rollout.generator_gpus={gpus} must be a multiple of parallel.tp={parallel.tp} x parallel.pp={parallel.pp} = "
            f"{ranks}: generators have the trainer's tp and pp; use {-(-gpus // ranks) * ranks}"
        )
    if gpus >= size:
        raise ValueError(f"rollout.generator_gpus={gpus} leaves none of the world's {size} ranks to train; start more ranks, or lower it")
    return size - gpus
