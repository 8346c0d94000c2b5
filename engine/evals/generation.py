"""Generate responses to a suite's questions with the engine's sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from engine.megatron.policy import Policy
from engine.rollout.config import RolloutConfig
from engine.rollout.engine import SamplingParams
from engine.rollout.sampler import generate
from engine.rollout.stopping import StopStrings
from engine.types import Prompt


@dataclass(frozen=True)
class Decoding:
    """Decoding settings. A response ends at a stop string, at a stop token, or after `max_tokens`."""

    max_tokens: int
    n: int = 1  # responses per prompt
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # in (0, 1]
    stop: tuple[str, ...] = ()  # strings that begin a base model's next question; not used by chat

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.n < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"max_tokens={self.max_tokens} and samples={self.n} must be at least 1, temperature={self.temperature} at least 0, "
                f"and top_p={self.top_p} in (0, 1]"
            )


class EvalResponse(NamedTuple):
    """A response without its stop string or token. `finish` is "stop", or "length" if it reached max_tokens."""

    text: str
    tokens: int
    finish: str


def respond(
    policy: Policy,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[np.ndarray],
    decoding: Decoding,
    rollout: RolloutConfig,
    seed: int,
    stop: tuple[int, ...],
) -> list[list[EvalResponse]]:
    """Generate decoding.n responses to each prompt, int32 [L]; returned in order, on every rank. `stop`: the ids that end a response.

    Sampling depends only on (seed, index of the prompt, sample, position). Raises ValueError if a prompt plus `max_tokens` exceeds the
    model's context.
    """
    until = StopStrings(tokenizer, decoding.stop)
    sampling = SamplingParams(decoding.max_tokens, stop, decoding.temperature, top_p=decoding.top_p, until=until)
    numbered = [Prompt(tokens, id=index) for index, tokens in enumerate(prompts)]
    groups = generate(policy, numbered, sampling, rollout, samples=decoding.n, seed=(seed,))

    def finished(tokens: list[int], stopped: bool) -> EvalResponse:
        content = tokens[:-1] if tokens[-1] in stop else tokens
        return EvalResponse(until.before(content), len(content), "stop" if stopped else "length")

    return [[finished(response.tokens.tolist(), response.stopped) for response in group] for group in groups]
