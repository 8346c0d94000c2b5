"""Jobs of the batching tests."""

from __future__ import annotations

from contextlib import closing

from engine.batching.build import build
from engine.batching.plan import plan
from engine.config import Model, Parallel
from engine.distributed.world import World
from engine.losses import SFT_LOSS
from engine.types import Step
from tests.support import jobs


def step_of_many_ranks(world: World, model: Model, ranks: int, count: int) -> tuple[dict[str, float], int]:
    """Metrics of one optimizer step on samples(3, count), planned for `ranks` ranks whose shares are built one after the other, and the
    plan's denominator of the loss."""
    from engine.megatron.policy import Policy

    samples = jobs.samples(3, count)
    trained = [int(sample.mask.sum()) for sample in samples]
    planned = plan([sample.length for sample in samples], ranks, 48, cost=model_cost(model), trained=trained)
    step: Step = [packed for rank in range(ranks) for packed in build(planned, rank, samples)]
    assert sorted(i for packed in step for i in packed.index_S if i >= 0) == list(range(count))
    with closing(Policy(model, jobs.OPTIM, Parallel(), world)) as policy:
        return policy.update(step, SFT_LOSS, jobs.OPTIM.lr), int(planned.denominators.tokens[0])


def model_cost(model: Model) -> tuple[int, int, int]:
    assert model.init is not None
    return model.init.cost
