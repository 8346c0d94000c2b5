"""What tests of the dry run measure on ranks: the memory of real steps, by torch's own record of allocations."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from engine.config import Llama, Model, Parallel
from engine.losses import nll
from engine.world import World
from tests import jobs

HELD = "what is held is read here"
M_MMAP_THRESHOLD = -3  # of mallopt(3)


def allocated(compute: Callable[[], Any]) -> tuple[int, int]:
    """(bytes at the mark HELD, at the worst moment) above what was there before, as torch's CPU allocator recorded them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        compute()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == HELD:
            held = live
        elif event.name() == "[memory]":
            live += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, live)
    return held, peak


@contextmanager
def giving_back() -> Iterator[None]:
    """Tensors are given back to the operating system when they are freed; usually malloc would keep them, in pieces that fit nothing."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)


def passage_memory(world: World, parallel: Parallel, model: Llama, lengths: list[int]) -> dict[str, tuple[int, int]]:
    """(held, peak) of one microbatch through this rank's stage on real tensors: by the allocator, and by the meter."""
    from engine.dryrun.stages import meter_of, microbatch
    from engine.megatron.passage import Passage
    from engine.megatron.policy import Policy

    packed = microbatch(lengths, sum(lengths))
    with closing(Policy(Model(init=model), jobs.OPTIM, parallel, world)) as policy:

        def compute() -> Passage:
            passage = Passage(policy, 0, packed)
            passage.forward()
            time.sleep(0.2)  # until gloo's threads have let go of what they gathered
            with record_function(HELD):
                pass
            passage.backward()
            return passage

        shared = compute().shared  # the first time makes what stays, too
        held, peak = allocated(compute)
        passage = Passage(policy, 0, packed)
        with meter_of(policy) as meter:
            passage.forward()
            metered = meter.live
            passage.backward()
        return {"allocator": (held - shared, peak), "meter": (metered - shared, meter.peak)}


def step_memory(world: World, parallel: Parallel, model: Llama, lengths: list[int], microbatches: int) -> int:
    """Bytes that a whole step takes on this rank at its worst moment, by the allocator: the less of two steps, for gloo's threads may be
    late in letting go."""
    from megatron.core.parallel_state import get_global_memory_buffer

    from engine.dryrun.stages import microbatch
    from engine.megatron.policy import Policy

    step = [microbatch(lengths, sum(lengths))] * microbatches
    with giving_back(), closing(Policy(Model(init=model), jobs.OPTIM, parallel, world)) as policy:

        def learn() -> None:
            policy.update(step, nll, 0.0)

        def worst() -> int:
            get_global_memory_buffer().buffer.clear()  # made again in the step
            return allocated(learn)[1]

        learn()  # the first time makes what stays
        return min(worst(), worst())
