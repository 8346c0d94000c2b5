"""Generation on ranks of its own, beside those that train: they hold the policy on a grid of the same tp and pp, are handed its
weights and told what to draw, and draw it while the others learn."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from engine.config import Parallel, Run
from engine.distributed.process_groups import Line
from engine.distributed.world import World
from engine.megatron.policy import Policy
from engine.rollout.sampler import Response, Sampling, Slotting, generate
from engine.types import Prompt

KEPT = "drawn.npz"  # in a checkpoint: what was drawn for the step to go on with, by weights that are no longer there


@dataclass(frozen=True)
class Ask:
    """What to draw: all that responses depend on but the weights."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    samples: int  # of each prompt
    seed: tuple[int, ...]

    def answered(self, policy: Policy, slotting: Slotting) -> list[list[Response]]:
        """The responses of `policy`; see sampler.generate."""
        return generate(policy, self.prompts, self.sampling, slotting, samples=self.samples, seed=self.seed)


@dataclass(frozen=True)
class Drawn:
    """Responses to each prompt of an Ask, and how they came about."""

    responses: list[list[Response]]
    version: int  # the optimizer step whose weights drew them
    said: dict[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As the contents of an npz file."""
        flat = list(chain(*self.responses))
        arrays: dict[str, Any] = {
            "tokens": np.concatenate([r.tokens for r in flat]),
            "logprobs": np.concatenate([r.logprobs for r in flat]),
            "lengths": [len(r.tokens) for r in flat],
            "stopped": [r.stopped for r in flat],
            "samples": len(self.responses[0]),
            "version": self.version,
            "names": list(self.said),
            "values": list(self.said.values()),
        }
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    @staticmethod
    def read(path: Path) -> Drawn:
        """What to_bytes wrote."""
        with np.load(path) as file:
            ends = file["lengths"].cumsum()[:-1]
            tokens, logprobs = np.split(file["tokens"], ends), np.split(file["logprobs"], ends)
            flat = [Response(t, p, bool(s)) for t, p, s in zip(tokens, logprobs, file["stopped"], strict=True)]
            samples, said = int(file["samples"]), dict(zip(file["names"].tolist(), file["values"].tolist(), strict=True))
            return Drawn([flat[i : i + samples] for i in range(0, len(flat), samples)], int(file["version"]), said)


def part(run: Run, world: World, slotting: Slotting) -> World | None:
    """The world of the ranks that train `run`. The last slotting.gpus ranks draw for them, and return None when those are done."""
    if not slotting.gpus:
        return world
    mine = world.parted(slotting.gpus)
    assert mine.bridge is not None
    if not mine.bridge.is_far:
        return mine
    with closing(Policy(run.model, None, run.parallel, mine, seed=run.seed)) as policy:
        _serve(policy, slotting)
    return None


def trainers(parallel: Parallel, size: int, gpus: int) -> int:
    """How many of `size` ranks train. Raises ValueError when the last `gpus` are no replicas of the trainer, or leave none."""
    ranks = parallel.tp * parallel.pp
    if gpus % ranks:
        raise ValueError(
            f"rollout.gpus={gpus} must be a multiple of parallel.tp={parallel.tp} x parallel.pp={parallel.pp} = {ranks}: generation has the"
            f" trainer's tp and pp, so that weights go from rank to rank; use {-(-gpus // ranks) * ranks}"
        )
    if gpus >= size:
        raise ValueError(f"rollout.gpus={gpus} leaves none of the world's {size} ranks to train; start more ranks, or lower it")
    return size - gpus


def _serve(policy: Policy, slotting: Slotting) -> None:
    """Draw what is asked, by the weights that come with it, until nothing more is."""
    talk, weights = _talk(policy), _weights(policy)
    assert talk is not None
    assert weights is not None
    while (told := talk.say(None)) is not None:
        ask, version = told
        policy.share_weights(weights.tell, taking=True)
        began = time.perf_counter()
        try:
            answer: Drawn | ValueError = Drawn(ask.answered(policy, slotting), version)
            answer.said["seconds_generate"] = time.perf_counter() - began
        except ValueError as error:
            answer = error
        talk.say(answer, FIRST_FAR)


class Apart:
    """The trainer's side: what it has asked for, and what has come. All its ranks do the same."""

    def __init__(self, policy: Policy):
        self.policy, self.talk, self.weights = policy, _talk(policy), _weights(policy)
        self.asked = False  # something that has not come yet
        self.ahead: Drawn | None = None  # what has come, and was not taken yet
        self.spent = {"seconds_wait": 0.0, "seconds_weights": 0.0, "weights_bytes": 0.0}  # since the last draw

    def draw(self, version: int, now: Ask, then: Ask | None, checkpoint: Path) -> Drawn:
        """The answer to `now`: asked for a step ago, or kept in the `checkpoint` that the run goes on from, or asked for here. After it
        `then` is asked for. What is asked for here is drawn by the policy's weights of now, which are `version` steps old.

        Its `said`: seconds_generate of drawing, seconds_wait that the trainer waited for it, seconds_hidden of drawing that it did not
        wait for; seconds_weights and weights_bytes of handing weights on, of which the bytes are this rank's share.
        Raises ValueError for what cannot be drawn; see sampler.generate.
        """
        if not self.asked and self.ahead is None:
            if (checkpoint / KEPT).exists():
                self.ahead = Drawn.read(checkpoint / KEPT)
            else:
                self._ask(now, version)
        drawn, self.ahead = self.arrived(), None
        assert drawn is not None
        if then is not None:
            self._ask(then, version)
        spent, self.spent = self.spent, dict.fromkeys(self.spent, 0.0)
        hidden = max(0.0, drawn.said["seconds_generate"] - spent["seconds_wait"])
        return replace(drawn, said=drawn.said | spent | {"seconds_hidden": hidden})

    def arrived(self) -> Drawn | None:
        """What was asked for, once it has come; None when nothing was."""
        if self.asked:
            began = time.perf_counter()
            box = [self.talk.say(None, FIRST_FAR)] if self.talk else [None]
            dist.broadcast_object_list(box, src=0)
            self.spent["seconds_wait"] += time.perf_counter() - began
            self.asked = False
            if isinstance(box[0], ValueError):
                raise box[0]
            self.ahead = box[0]
        return self.ahead

    def _ask(self, ask: Ask, version: int) -> None:
        began = time.perf_counter()
        if self.talk:
            self.talk.say((ask, version))
        size = self.policy.share_weights(self.weights.tell if self.weights else _to_nobody, taking=False)
        self.asked = True
        self.spent["seconds_weights"] += time.perf_counter() - began
        self.spent["weights_bytes"] += size

    def close(self) -> None:
        """Let the ranks that draw go. If they are still at something this is a failure, which ends them too."""
        if self.talk and not self.asked:
            self.talk.say(None)


FIRST_FAR = 1  # on the line below


def _talk(policy: Policy) -> Line | None:
    """Between the trainer's first rank, which has number 0, and all that draw; None for the trainer's others."""
    world, bridge = policy.world, policy.world.bridge
    assert bridge is not None
    if not bridge.is_far and world.rank > 0:
        return None
    return bridge.line("talk", FIRST_FAR + world.rank if bridge.is_far else 0, 1 + bridge.far)


def _weights(policy: Policy) -> Line | None:
    """From the trainer's first replica to all that draw, between ranks at one place of the grid; None for the trainer's other replicas."""
    bridge, grid = policy.world.bridge, policy.grid
    assert bridge is not None
    if not bridge.is_far and grid.dp_rank > 0:
        return None
    place, replicas = grid.pp_rank * grid.tp + grid.tp_rank, bridge.far // (grid.tp * grid.pp)
    rank = 1 + grid.dp_rank if bridge.is_far else 0
    return bridge.line(f"weights-{place}", rank, 1 + replicas, on_gpu=policy.world.on_gpu)


def _to_nobody(_: Tensor) -> None:
    """What a replica does with weights that another hands on."""
