"""Suggest settings that make a launch fit in memory: try changes one after the other, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import get_args

from engine.config import Recompute, Run, override
from engine.dryrun.compose import composer
from engine.dryrun.memory import memory_of_ranks
from engine.dryrun.workload import Simulation, StageBuilder

TIMES = (1, 2, 4, 8)  # multiples of the requested number of GPUs to try


def settings_that_fit(simulation: Simulation, given: Sequence[tuple[int, int]], rehearse: StageBuilder) -> str:
    """Return settings under which all stages fit, as command-line text; "" if none were found. Candidates are checked with composed stages
    first, then simulated in full."""
    composed = composer(rehearse)
    for gpus, settings in _candidates(simulation):
        if _fits(simulation, gpus, settings, given, composed) and _fits(simulation, gpus, settings, given, rehearse):
            return " ".join([*([f"--gpus {gpus}"] if gpus != simulation.gpus else []), *settings])
    return ""


def _fits(simulation: Simulation, gpus: int, settings: list[str], given: Sequence[tuple[int, int]], rehearse: StageBuilder) -> bool:
    try:
        other = Simulation.of(override(simulation.run, settings), gpus, simulation.hardware, rehearse, given)
        return all(rank.fits for rank in memory_of_ranks(other))
    except ValueError:  # these settings are invalid together
        return False


def _candidates(simulation: Simulation) -> Iterator[tuple[int, list[str]]]:
    """Yield (GPUs, settings): each change alone, then accumulated; then more stages and more GPUs, each alone and with all changes."""
    changes = list(_changes(simulation))
    accumulated = list(accumulate(changes, lambda before, change: _merged(before, change)))
    for settings in [*changes, *accumulated]:
        yield simulation.gpus, settings
    all_changes = accumulated[-1] if accumulated else []
    for times in TIMES:
        deeper = list(_deeper(simulation.run, times * simulation.gpus))
        for extra in ([], all_changes):
            for settings in ([], *deeper):
                if times > 1 or settings:
                    yield times * simulation.gpus, _merged(extra, settings)


def _merged(before: list[str], after: list[str]) -> list[str]:
    """Both lists; of a setting in both, the value in `after`."""
    return list({setting.partition("=")[0]: setting for setting in [*before, *after]}.values())


def _changes(simulation: Simulation) -> Iterator[list[str]]:
    run, generation = simulation.run, simulation.workload.generation
    if simulation.workload.reference == "resident":
        yield ["algorithm.reference=offloaded"]
    if generation and generation.rollout.max_num_seqs > run.parallel.pp:
        yield [f"algorithm.rollout.max_num_seqs={max(run.parallel.pp, generation.rollout.max_num_seqs // 4)}"]
    if not run.parallel.distributed_optimizer and simulation.dp > 1:
        yield ["parallel.distributed_optimizer=true"]
    kinds = get_args(Recompute)
    for recompute in kinds[kinds.index(run.parallel.recompute) + 1 :]:
        yield [f"parallel.recompute={recompute}"]
    budget, longest = run.tokens_per_microbatch, int(simulation.sequences.lengths_N.max())
    while budget // 2 >= longest:
        budget //= 2
        yield [f"tokens_per_microbatch={budget}"]


def _deeper(run: Run, gpus: int) -> Iterator[list[str]]:
    """Yield settings with more pipeline stages, even stages and no virtual stages."""
    for pp in range(run.parallel.pp + 1, gpus // run.parallel.tp + 1):
        if gpus % (run.parallel.tp * pp) == 0:
            for counted in ("true", "false"):
                ends = [f"parallel.count_embedding={counted}", f"parallel.count_loss={counted}"]
                yield ["parallel.vpp=1", f"parallel.pp={pp}", "parallel.stages=[]", *ends]
