"""Compose the stages of any layout from four simulated stages. All layers are equal, so the memory and cost of a stage is a constant, plus
a multiple of one layer's, plus that of the embedding or the head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from engine.config import ModelShape, Optim, Parallel
from engine.dryrun.types import Stage, Work
from engine.dryrun.workload import StageBuilder

SUMS = ("parameters", "weights", "gradients", "optimizer", "held")
WORKS = ("forward", "backward", "inference")


class Samples(NamedTuple):
    """Four stages: the embedding and one layer, one layer, two layers, one layer and the head."""

    first: Stage
    one: Stage
    two: Stage
    last: Stage


def composer(rehearse: StageBuilder) -> StageBuilder:
    """Return a faster function with the interface of `rehearse`. It simulates only four small stages per combination of tp, recomputation
    and microbatch."""

    @cache
    def samples(model: ModelShape, parallel: Parallel, lengths: tuple[int, ...], options: tuple[tuple[str, Any], ...]) -> Samples:
        """Simulate one replica; with several, only the optimizer's memory differs."""
        small = replace(parallel, pp=4, vpp=1, count_embedding=False, count_loss=False, stages=(1, 1, 2, 1))
        return Samples(*rehearse(replace(model, layers=5), small, small.model_ranks, lengths, **dict(options)))

    def composed(
        model: ModelShape, parallel: Parallel, world_size: int, lengths: Sequence[int], *, optim: Optim | None, **options: Any
    ) -> list[Stage]:
        parallel.check(model, world_size)
        if model.tied and parallel.pp == 1:  # the embedding and the head share one weight on the same stage
            return rehearse(model, parallel, world_size, lengths, optim=optim, **options)
        grid = replace(parallel, pp=1, vpp=1, count_embedding=False, count_loss=False, stages=())
        known = samples(model, grid, tuple(lengths), (("optim", optim), *options.items()))
        shares = world_size // parallel.model_ranks if parallel.distributed_optimizer else 1
        layers_per_stage = parallel.layers_per_stage(model)
        stages = [_stage(known, layers, place, len(layers_per_stage)) for place, layers in enumerate(layers_per_stage)]
        placed = [
            replace(stage, pp=i % parallel.pp, chunk=i // parallel.pp, optimizer=stage.optimizer // shares)
            for i, stage in enumerate(stages)
        ]
        return sorted(placed, key=lambda stage: (stage.pp, stage.chunk))

    return composed


def _stage(known: Samples, layers: int, place: int, count: int) -> Stage:
    first, last = int(place == 0), int(place == count - 1)
    # One layer costs two - one; the constant is one - (two - one); the embedding costs first - one, the head last - one.
    shares = ((known.first, first), (known.one, 2 - layers - first - last), (known.two, layers - 1), (known.last, last))
    sums = {name: sum(share * getattr(stage, name) for stage, share in shares) for name in SUMS}
    works = {name: _mixed((getattr(stage, name), share) for stage, share in shares) for name in WORKS}
    # The peak is at one of three moments: the backward of the last layer, after the head's activations are freed; the backward of the head;
    # the backward of the embedding, after all else is freed.
    head = last * (known.last.held - known.one.held)
    moments = [sums["held"] - head + known.two.peak - known.two.held]
    moments += [sums["held"] + known.last.peak - known.last.held] if last else []
    moments += [known.first.peak] if first else []
    present = [known.two, *([known.first] if first else []), *([known.last] if last else [])]
    inferred = max(stage.inference_peak for stage in present)
    return replace(known.one, layers=layers, **sums, **works, peak=max(moments), inference_peak=inferred)


def _mixed(shares: Iterable[tuple[Work, int]]) -> Work:
    """Weighted sum of works. Weights may be negative; entries whose count is not positive are dropped."""
    pairs = list(shares)

    def total(of: Callable[[Work], float]) -> float:
        return sum(share * of(work) for work, share in pairs)

    def counted(of: Callable[[Work], Counter[Any]]) -> Counter[Any]:
        names = {name for work, _ in pairs for name in of(work)}
        counts = {name: sum(share * of(work)[name] for work, share in pairs) for name in names}
        return Counter({name: count for name, count in counts.items() if count > 0})

    return Work(
        counted(lambda work: work.matmuls),
        total(lambda work: work.attention),
        total(lambda work: work.traffic),
        int(total(lambda work: work.kernels)),
        counted(lambda work: work.collectives),
        counted(lambda work: work.overlapped),
    )
