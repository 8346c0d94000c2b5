"""Jobs of the tests of disaggregated generation."""

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
from engine.rollout.config import RolloutConfig
from engine.rollout.engine import GenerationRequest, GenerationResult, Response
from engine.rollout.sampler import respond
from tests.support import jobs_rlvr


@contextmanager
def restored_world(world: World) -> Iterator[None]:
    """A context in which a job may split the world; afterwards it is restored for the next job."""
    store = dist.distributed_c10d._get_default_store()
    turn = store.add(f"parted/{world.rank}", 1)
    yield
    dist.destroy_process_group()
    gc.collect()  # every group that is still referenced has threads
    dist.init_process_group("gloo", store=PrefixStore(f"whole-{turn}", store), rank=world.rank, world_size=world.size)


def steps(world: World, folder: Path, parallel: Parallel, **changes: Any) -> list[dict[str, Any]]:
    """jobs_rlvr.steps on the training ranks; nothing on the others."""
    settings = jobs_rlvr.make_run(folder, parallel, **changes)
    with restored_world(world):
        mine = settings.algorithm.split_world(settings, world)
        return [] if mine is None else jobs_rlvr.steps(mine, folder, parallel, **changes)


class Sequential:
    """A RolloutEngine on one rank. It generates before each step what disaggregated ranks generate ahead."""

    def __init__(self, policy: Any, rollout: RolloutConfig):
        self.policy, self.rollout = policy, rollout
        self.ahead: GenerationResult | None = None

    def generate(self, step: int, request: GenerationRequest, next_request: GenerationRequest | None, checkpoint: Path) -> GenerationResult:
        result = self.ahead or self._result(request, step)
        self.ahead = self._result(next_request, step) if next_request and self.rollout.max_staleness else None
        return result

    def _result(self, request: GenerationRequest, version: int) -> GenerationResult:
        return GenerationResult(self.respond(request), version, {"time/generate": 1.0, "rollout/weights_bytes": 0.0})

    def respond(self, request: GenerationRequest) -> list[list[Response]]:
        return respond(self.policy, self.rollout, request)


def sequential(world: World, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """`steps` with sequential generation on one rank."""
    from engine.megatron.policy import Policy

    settings = jobs_rlvr.make_run(folder, Parallel(), **changes)
    settings = replace(settings, out=f"{settings.out}-sequential")
    with (
        closing(Policy(settings.model, settings.optim, Parallel(), world, seed=settings.seed)) as policy,
        closing(settings.algorithm.start(policy, settings)) as algorithm,
    ):
        return jobs_rlvr.learned(replace(algorithm, engine=Sequential(policy, settings.algorithm.rollout)), settings)


def whole_run(world: World, folder: Path, parallel: Parallel, **changes: Any) -> str:
    """A run of engine.train, with checkpoints. Returns the error of an invalid run."""
    from engine.train import train

    with restored_world(world):
        try:
            train(jobs_rlvr.make_run(folder, parallel, **changes), world)
        except ValueError as error:
            return str(error)
    return ""


def learned_after_the_next_is_drawn(world: World, folder: Path, **changes: Any) -> None:
    """Three steps of engine.train, each of which waits in its update for the responses of the next step."""
    from engine import train

    drawn = folder / "drawn"
    generate, learn = remote.respond, train.learn

    def noted(*options: Any) -> Any:
        responses = generate(*options)
        with drawn.open("a") as file:
            file.write("x")
        return responses

    def late(algorithm: Any, step: int, *options: Any) -> tuple[dict[str, float], float]:
        deadline = time.monotonic() + 120
        while step < 2 and drawn.stat().st_size < step + 2:  # one byte per generation
            assert time.monotonic() < deadline, f"step {step + 1} is not drawn before step {step} is learned"
            time.sleep(0.01)
        return learn(algorithm, step, *options)

    with mock.patch.object(remote, "respond", noted), mock.patch.object(train, "learn", late), restored_world(world):
        train.train(jobs_rlvr.make_run(folder, Parallel(), steps=3, **changes), world)


def weights_travel(world: World, parallel: Parallel, gpus: int) -> tuple[int, int, list[float]]:
    """After the training ranks have changed their weights and sent them: this rank's grid position, the bytes sent, the sum of each
    parameter."""
    from engine.config import Model
    from engine.megatron import weight_sync
    from engine.megatron.policy import Policy

    with restored_world(world), mock.patch.object(weight_sync, "BUCKET_BYTES", 1 << 14):
        mine = world.split(gpus)
        assert mine.parent is not None
        with closing(Policy(Model(init=jobs_rlvr.SHAPE), None, parallel, mine)) as policy:
            parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
            with torch.no_grad():
                for parameter in parameters if not mine.parent.is_generator else ():
                    parameter.mul_(3).add_(1)
            line = remote._weights_group(policy)
            size = policy.send_weights(line.broadcast if line else remote._discard, receives=mine.parent.is_generator)
            place = policy.grid.pp_rank * policy.grid.tp + policy.grid.tp_rank
            return place, size, [float(parameter.double().sum()) for parameter in parameters]
