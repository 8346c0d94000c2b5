"""Jobs of the dry-run tests: the memory of real steps, from the records of torch's allocator."""

from __future__ import annotations

import time
from contextlib import closing

from torch.profiler import record_function

from engine.config import Model, ModelShape, Parallel
from engine.distributed.world import World
from engine.losses import SFT_LOSS
from tests.support import jobs
from tests.support.allocator import HELD, allocated


def stage_memory(world: World, parallel: Parallel, model: ModelShape, lengths: list[int]) -> dict[str, tuple[int, int]]:
    """(held, peak) bytes of one microbatch in this rank's stage on real tensors: from the allocator, and from the meter."""
    from engine.dryrun.stages import meter_of, microbatch
    from engine.megatron.policy import Policy
    from engine.megatron.single_stage import SingleStage

    packed = microbatch(lengths, sum(lengths))
    with closing(Policy(Model(init=model), jobs.OPTIM, parallel, world)) as policy:

        def compute() -> SingleStage:
            passage = SingleStage(policy, 0, packed)
            passage.forward()
            time.sleep(0.2)  # until gloo's threads have released gathered tensors
            with record_function(HELD):
                pass
            passage.backward()
            return passage

        shared = compute().shared  # the first run also allocates what is kept
        held, peak = allocated(compute)
        passage = SingleStage(policy, 0, packed)
        with meter_of(policy) as meter:
            passage.forward()
            metered = meter.live
            passage.backward()
        return {"allocator": (held - shared, peak), "meter": (metered - shared, meter.peak)}


def step_memory(world: World, parallel: Parallel, model: ModelShape, lengths: list[int], microbatches: int) -> int:
    """Peak bytes of a step on this rank, from the allocator. The smaller of two steps, because gloo's threads may release tensors late."""
    from megatron.core.parallel_state import get_global_memory_buffer

    from engine.dryrun.stages import microbatch
    from engine.megatron.policy import Policy

    step = [microbatch(lengths, sum(lengths))] * microbatches
    with closing(Policy(Model(init=model), jobs.OPTIM, parallel, world)) as policy:

        def learn() -> None:
            policy.update(step, SFT_LOSS, 0.0)

        def worst() -> int:
            get_global_memory_buffer().buffer.clear()  # allocated again in the step
            return allocated(learn)[1]

        learn()  # the first step allocates what is kept
        return min(worst(), worst())
