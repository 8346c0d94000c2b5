"""What the tests of generation on ranks of its own run on ranks."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from engine.config import Parallel
from engine.distributed.world import World
from engine.rollout import remote
from engine.rollout.remote import Ask, Drawn
from engine.rollout.sampler import Slotting
from tests.support import jobs_rlvr


@contextmanager
def whole_again(world: World) -> Iterator[None]:
    """Within it a job may part the world; the next job finds it whole."""
    store = dist.distributed_c10d._get_default_store()
    turn = store.add(f"parted/{world.rank}", 1)
    yield
    dist.destroy_process_group()
    gc.collect()  # each group that is still held somewhere has threads of its own
    dist.init_process_group("gloo", store=PrefixStore(f"whole-{turn}", store), rank=world.rank, world_size=world.size)


def steps(world: World, folder: Path, parallel: Parallel, **changes: Any) -> list[dict[str, Any]]:
    """As jobs_rlvr.steps, on the ranks that train; nothing on the others."""
    settings = jobs_rlvr.asked(folder, parallel, **changes)
    with whole_again(world):
        mine = settings.algorithm.part(settings, world)
        return [] if mine is None else jobs_rlvr.steps(mine, folder, parallel, **changes)


class Sequential:
    """Stands in for Apart on a single rank: what is drawn while a step is learned elsewhere is drawn before it here."""

    def __init__(self, policy: Any, slotting: Slotting):
        self.policy, self.slotting = policy, slotting
        self.ahead: Drawn | None = None

    def draw(self, version: int, now: Ask, then: Ask | None, checkpoint: Path) -> Drawn:
        drawn = self.ahead or self._drawn(now, version)
        self.ahead = self._drawn(then, version) if then else None
        return drawn

    def _drawn(self, ask: Ask, version: int) -> Drawn:
        return Drawn(ask.answered(self.policy, self.slotting), version, {"seconds_generate": 1.0, "weights_bytes": 0.0})


def sequential(world: World, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """As `steps`, by one rank that does one thing after the other."""
    from engine.megatron.policy import Policy

    settings = jobs_rlvr.asked(folder, Parallel(), **changes)
    settings = replace(settings, out=f"{settings.out}-sequential")
    with (
        closing(Policy(settings.model, settings.optim, Parallel(), world, seed=settings.seed)) as policy,
        closing(settings.algorithm.start(policy, settings)) as algorithm,
    ):
        return jobs_rlvr.learned(replace(algorithm, apart=Sequential(policy, settings.algorithm.rollout)), settings)


def whole_run(world: World, folder: Path, parallel: Parallel, **changes: Any) -> str:
    """Through the loop, checkpoints and all; what is said to a run that cannot be."""
    from engine.train import train

    with whole_again(world):
        try:
            train(jobs_rlvr.asked(folder, parallel, **changes), world)
        except ValueError as error:
            return str(error)
    return ""


def learned_after_the_next_is_drawn(world: World, folder: Path, **changes: Any) -> None:
    """Three steps through the loop, each of which is learned only once the responses to the next are there."""
    from engine import train

    drawn = folder / "drawn"
    draw, learn = remote.Ask.answered, train.learn

    def noted(ask: Ask, *how: Any) -> Any:
        responses = draw(ask, *how)
        with drawn.open("a") as file:
            file.write("x")
        return responses

    def late(algorithm: Any, step: int, *how: Any) -> dict[str, float]:
        deadline = time.monotonic() + 120
        while step < 2 and drawn.stat().st_size < step + 2:  # one byte for each draw
            assert time.monotonic() < deadline, f"step {step + 1} is not drawn before step {step} is learned"
            time.sleep(0.01)
        return learn(algorithm, step, *how)

    with mock.patch.object(remote.Ask, "answered", noted), mock.patch.object(train, "learn", late), whole_again(world):
        train.train(jobs_rlvr.asked(folder, Parallel(), steps=3, **changes), world)


def weights_travel(world: World, parallel: Parallel, gpus: int) -> tuple[int, int, list[float]]:
    """Once the first world has changed its weights and handed them on: this rank's place in its grid, bytes, a sum of each parameter."""
    from engine.config import Model
    from engine.megatron import policy as policies

    with whole_again(world), mock.patch.object(policies, "BUCKET_BYTES", 1 << 14):
        mine = world.parted(gpus)
        assert mine.bridge is not None
        with closing(policies.Policy(Model(init=jobs_rlvr.SHAPE), None, parallel, mine)) as policy:
            parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
            with torch.no_grad():
                for parameter in parameters if not mine.bridge.is_far else ():
                    parameter.mul_(3).add_(1)
            line = remote._weights(policy)
            size = policy.share_weights(line.tell if line else remote._to_nobody, taking=mine.bridge.is_far)
            place = policy.grid.pp_rank * policy.grid.tp + policy.grid.tp_rank
            return place, size, [float(parameter.double().sum()) for parameter in parameters]
