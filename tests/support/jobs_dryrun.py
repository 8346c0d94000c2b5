"""What tests of the dry run measure on ranks: the memory of real steps, by torch's own record of allocations."""

from __future__ import annotations

import time
from contextlib import closing

from torch.profiler import record_function

from engine.config import Model, ModelShape, Parallel
from engine.distributed.world import World
from engine.losses import SFT_LOSS
from tests.support import jobs
from tests.support.allocator import HELD, allocated


def passage_memory(world: World, parallel: Parallel, model: ModelShape, lengths: list[int]) -> dict[str, tuple[int, int]]:
    """(held, peak) of one microbatch through this rank's stage on real tensors: by the allocator, and by the meter."""
    from engine.dryrun.stages import meter_of, microbatch
    from engine.megatron.policy import Policy
    from engine.megatron.single_stage import SingleStage

    packed = microbatch(lengths, sum(lengths))
    with closing(Policy(Model(init=model), jobs.OPTIM, parallel, world)) as policy:

        def compute() -> SingleStage:
            passage = SingleStage(policy, 0, packed)
            passage.forward()
            time.sleep(0.2)  # until gloo's threads have let go of what they gathered
            with record_function(HELD):
                pass
            passage.backward()
            return passage

        shared = compute().shared  # the first time makes what stays, too
        held, peak = allocated(compute)
        passage = SingleStage(policy, 0, packed)
        with meter_of(policy) as meter:
            passage.forward()
            metered = meter.live
            passage.backward()
        return {"allocator": (held - shared, peak), "meter": (metered - shared, meter.peak)}


def step_memory(world: World, parallel: Parallel, model: ModelShape, lengths: list[int], microbatches: int) -> int:
    """Bytes that a whole step takes on this rank at its worst moment, by the allocator: the less of two steps, for gloo's threads may be
    late in letting go."""
    from megatron.core.parallel_state import get_global_memory_buffer

    from engine.dryrun.stages import microbatch
    from engine.megatron.policy import Policy

    step = [microbatch(lengths, sum(lengths))] * microbatches
    with closing(Policy(Model(init=model), jobs.OPTIM, parallel, world)) as policy:

        def learn() -> None:
            policy.update(step, SFT_LOSS, 0.0)

        def worst() -> int:
            get_global_memory_buffer().buffer.clear()  # made again in the step
            return allocated(learn)[1]

        learn()  # the first time makes what stays
        return min(worst(), worst())
