"""Stages of any layout from four rehearsed ones. Layers are alike: what a stage holds and does is a sum over its layers, a constant, and
what the embedding and the head add at the ends."""

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
    """A stage of a layer and the embedding, of one layer, of two, and of a layer and the head."""

    first: Stage
    one: Stage
    two: Stage
    last: Stage


def composer(rehearse: StageBuilder) -> StageBuilder:
    """What answers as `rehearse` does, from four small stages for each tp, kind of recomputation and microbatch."""

    @cache
    def samples(model: ModelShape, parallel: Parallel, lengths: tuple[int, ...], options: tuple[tuple[str, Any], ...]) -> Samples:
        """Of one replica: with more of them, only the optimizer differs."""
        small = replace(parallel, pp=4, vpp=1, count_embedding=False, count_loss=False, stages=(1, 1, 2, 1))
        return Samples(*rehearse(replace(model, layers=5), small, small.model_ranks, lengths, **dict(options)))

    def composed(
        model: ModelShape, parallel: Parallel, world_size: int, lengths: Sequence[int], *, optim: Optim | None, **options: Any
    ) -> list[Stage]:
        parallel.check(model, world_size)
        if model.tied and parallel.pp == 1:  # one stage has both ends, and their weight but once
            return rehearse(model, parallel, world_size, lengths, optim=optim, **options)
        grid = replace(parallel, pp=1, vpp=1, count_embedding=False, count_loss=False, stages=())
        known = samples(model, grid, tuple(lengths), (("optim", optim), *options.items()))
        shares = world_size // parallel.model_ranks if parallel.distributed_optimizer else 1
        dealt = parallel.layers_per_stage(model)
        stages = [_stage(known, layers, place, len(dealt)) for place, layers in enumerate(dealt)]
        placed = [
            replace(stage, pp=i % parallel.pp, chunk=i // parallel.pp, optimizer=stage.optimizer // shares)
            for i, stage in enumerate(stages)
        ]
        return sorted(placed, key=lambda stage: (stage.pp, stage.chunk))

    return composed


def _stage(known: Samples, layers: int, place: int, count: int) -> Stage:
    first, last = int(place == 0), int(place == count - 1)
    # One layer is two - one; the constant is one - (two - one); the ends are first - one and last - one.
    shares = ((known.first, first), (known.one, 2 - layers - first - last), (known.two, layers - 1), (known.last, last))
    sums = {name: sum(share * getattr(stage, name) for stage, share in shares) for name in SUMS}
    works = {name: _mixed((getattr(stage, name), share) for stage, share in shares) for name in WORKS}
    # Three moments: the backward of the last layer, when the head has let go; the head's own; and the embedding's, when all else has.
    head = last * (known.last.held - known.one.held)
    moments = [sums["held"] - head + known.two.peak - known.two.held]
    moments += [sums["held"] + known.last.peak - known.last.held] if last else []
    moments += [known.first.peak] if first else []
    there = [known.two, *([known.first] if first else []), *([known.last] if last else [])]
    inferred = max(stage.inference_peak for stage in there)
    return replace(known.one, layers=layers, **sums, **works, peak=max(moments), inference_peak=inferred)


def _mixed(shares: Iterable[tuple[Work, int]]) -> Work:
    """The sum of works, each as often as it says."""
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
