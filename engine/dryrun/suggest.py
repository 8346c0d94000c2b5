"""What would make a launch fit: changes of settings, tried one after the other, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import get_args

from engine.algorithms.rlvr import RLVR
from engine.config import Recompute, Run, override
from engine.dryrun.compose import composer
from engine.dryrun.memory import ledger
from engine.dryrun.workload import Rehearse, Scene

TIMES = (1, 2, 4, 8)  # as many GPUs as were asked for, before there is said to be no way


def way_out(scene: Scene, given: Sequence[tuple[int, int]], rehearse: Rehearse) -> str:
    """Settings under which every stage fits: what was composed from parts is rehearsed as a whole before it is said. "" for none."""
    composed = composer(rehearse)
    for gpus, settings in _ways(scene):
        if _fits(scene, gpus, settings, given, composed) and _fits(scene, gpus, settings, given, rehearse):
            return " ".join([*([f"--gpus {gpus}"] if gpus != scene.gpus else []), *settings])
    return ""


def _fits(scene: Scene, gpus: int, settings: list[str], given: Sequence[tuple[int, int]], rehearse: Rehearse) -> bool:
    try:
        other = Scene.of(override(scene.run, settings), gpus, scene.hardware, rehearse, given)
        return all(rank.fits for rank in ledger(other))
    except ValueError:  # such a run cannot start
        return False


def _ways(scene: Scene) -> Iterator[tuple[int, list[str]]]:
    """(GPUs, settings): each change alone, then one upon the other; then more stages, then more GPUs, alone and with all the rest."""
    changes = list(_changes(scene))
    together = list(accumulate(changes, lambda before, change: _merged(before, change)))
    for settings in [*changes, *together]:
        yield scene.gpus, settings
    everything = together[-1] if together else []
    for times in TIMES:
        deeper = list(_deeper(scene.run, times * scene.gpus))
        for extra in ([], everything):
            for settings in ([], *deeper):
                if times > 1 or settings:
                    yield times * scene.gpus, _merged(extra, settings)


def _merged(before: list[str], after: list[str]) -> list[str]:
    """Both, a later value of the same setting in place of an earlier one."""
    return list({setting.partition("=")[0]: setting for setting in [*before, *after]}.values())


def _changes(scene: Scene) -> Iterator[list[str]]:
    run, algorithm = scene.run, scene.run.algorithm
    if isinstance(algorithm, RLVR) and algorithm.kl_coef and algorithm.reference == "resident":
        yield ["algorithm.reference=offloaded"]
    if isinstance(algorithm, RLVR) and algorithm.rollout.slots > run.parallel.pp:
        yield [f"algorithm.rollout.slots={max(run.parallel.pp, algorithm.rollout.slots // 4)}"]
    if not run.parallel.distributed_optimizer and scene.replicas > 1:
        yield ["parallel.distributed_optimizer=true"]
    kinds = get_args(Recompute)
    for recompute in kinds[kinds.index(run.parallel.recompute) + 1 :]:
        yield [f"parallel.recompute={recompute}"]
    budget, longest = run.tokens_per_microbatch, int(scene.sequences.lengths_N.max())
    while budget // 2 >= longest:
        budget //= 2
        yield [f"tokens_per_microbatch={budget}"]


def _deeper(run: Run, gpus: int) -> Iterator[list[str]]:
    """More pipeline stages, layers dealt anew; virtual stages are given up."""
    for pp in range(run.parallel.pp + 1, gpus // run.parallel.tp + 1):
        if gpus % (run.parallel.tp * pp) == 0:
            for counted in ("true", "false"):
                ends = [f"parallel.count_embedding={counted}", f"parallel.count_loss={counted}"]
                yield ["parallel.vpp=1", f"parallel.pp={pp}", "parallel.stages=[]", *ends]
