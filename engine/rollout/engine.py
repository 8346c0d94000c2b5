"""The interface of rollout engines, and what goes in and comes out of one.

To add an engine, write its class in a file of this folder and name it in ENGINES of config.py.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine.files import refusing
from engine.rollout.config import ENGINES, RolloutConfig
from engine.types import Prompt

if TYPE_CHECKING:
    from engine.megatron.policy import Policy
    from engine.rollout.stopping import StopStrings


@dataclass(frozen=True)
class SamplingParams:
    """How to sample responses. temperature=0 is greedy decoding.

    A response ends with a stop token or with the last token of a stop string, and includes it.
    """

    max_tokens: int
    stop: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    until: StopStrings | None = None  # stop strings

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature={self.temperature}, top_k={self.top_k} must not be negative, top_p={self.top_p} be in (0, 1]")


@dataclass(frozen=True)
class Response:
    """The generated continuation of a prompt."""

    tokens: np.ndarray  # int32 [n]; if `stopped`, the last one is the stop token
    logprobs: np.ndarray  # float32 [n], at the sampling temperature (at temperature 0: at temperature 1)
    stopped: bool


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate: together with the weights, it determines the responses."""

    prompts: Sequence[Prompt]
    sampling: SamplingParams
    samples_per_prompt: int
    seed: tuple[int, ...]


@dataclass(frozen=True)
class GenerationResult:
    """The responses to each prompt of a request."""

    responses: list[list[Response]]
    version: int  # the optimizer step whose weights generated them
    metrics: dict[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The contents of an npz file that `read` understands."""
        flat = list(chain(*self.responses))
        arrays: dict[str, Any] = {
            "tokens": np.concatenate([r.tokens for r in flat]),
            "logprobs": np.concatenate([r.logprobs for r in flat]),
            "lengths": [len(r.tokens) for r in flat],
            "stopped": [r.stopped for r in flat],
            "samples": len(self.responses[0]),
            "version": self.version,
            "names": list(self.metrics),
            "values": list(self.metrics.values()),
        }
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    @staticmethod
    def read(path: Path) -> GenerationResult:
        """Read a file that `to_bytes` wrote."""
        with refusing(path, "move this checkpoint away to resume from an earlier one"), np.load(path, allow_pickle=False) as file:
            ends = file["lengths"].cumsum()[:-1]
            tokens, logprobs = np.split(file["tokens"], ends), np.split(file["logprobs"], ends)
            flat = [Response(t, p, bool(s)) for t, p, s in zip(tokens, logprobs, file["stopped"], strict=True)]
            samples, metrics = int(file["samples"]), dict(zip(file["names"].tolist(), file["values"].tolist(), strict=True))
            return GenerationResult([flat[i : i + samples] for i in range(0, len(flat), samples)], int(file["version"]), metrics)


class RolloutEngine(Protocol):
    """Generates responses with the weights of the policy. All ranks that train call every method, with equal arguments."""

    def generate(self, step: int, request: GenerationRequest, next_request: GenerationRequest | None, checkpoint: Path) -> GenerationResult:
        """The responses of `step`. An engine that works ahead starts on `next_request` before it returns; None: there is no next step.
        `checkpoint` is the folder that the run resumed from; it holds the files of `extra_state`. Raises ValueError for a request that
        cannot be fulfilled."""
        ...

    def respond(self, request: GenerationRequest) -> list[list[Response]]:
        """The responses of the current weights, for evaluation."""
        ...

    def extra_state(self) -> dict[str, bytes]:
        """Files to keep in a checkpoint, by name: responses that were generated ahead."""
        ...

    def close(self) -> None:
        """Release ranks, processes and memory."""
        ...


def start_engine(policy: Policy, rollout: RolloutConfig) -> RolloutEngine:
    """The engine that `rollout` asks for: on dedicated ranks, or on those that train."""
    if policy.world.parent is not None:
        from engine.rollout.remote import RemoteGenerator

        return RemoteGenerator(policy, rollout)
    return resolve_name(ENGINES[rollout.engine])(policy, rollout)
