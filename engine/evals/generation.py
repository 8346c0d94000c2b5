"""Generates responses to a suite's questions with the engine's sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from engine.files import read_object
from engine.megatron.policy import Policy
from engine.rollout.config import RolloutConfig
from engine.rollout.engine import SamplingParams
from engine.rollout.sampler import generate, stop_tokens
from engine.rollout.stopping import StopStrings
from engine.types import Prompt


@dataclass(frozen=True)
class Decoding:
    """Decoding settings. A response ends at a stop string, at eos, or after `max_tokens`."""

    max_tokens: int
    n: int = 1  # responses per prompt
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # in (0, 1]
    stop: tuple[str, ...] = ()  # strings

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
) -> list[list[EvalResponse]]:
    """`n` responses to each prompt, int32 [L], in order, on every rank.

    Sampling depends only on (seed, index of the prompt, sample, position). Raises ValueError if a prompt plus `max_tokens` exceeds the
    model's context.
    """
    ends, until = end_tokens(policy.folder, tokenizer), StopStrings(tokenizer, decoding.stop)
    sampling = SamplingParams(decoding.max_tokens, ends, decoding.temperature, top_p=decoding.top_p, until=until)
    numbered = [Prompt(tokens, id=index) for index, tokens in enumerate(prompts)]
    groups = generate(policy, numbered, sampling, rollout, samples=decoding.n, seed=(seed,))

    def finished(tokens: list[int], stopped: bool) -> EvalResponse:
        content = tokens[:-1] if tokens[-1] in ends else tokens
        return EvalResponse(until.before(content), len(content), "stop" if stopped else "length")

    return [[finished(response.tokens.tolist(), response.stopped) for response in group] for group in groups]


def end_tokens(folder: Path | None, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ids that end a response: eos_token_id in the model folder's configs, and the tokenizer's eos."""
    named: list[int] = []
    for path in [folder / name for name in ("generation_config.json", "config.json")] if folder else []:
        ids = read_object(path, "a JSON object of settings").get("eos_token_id") if path.exists() else None
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if wrong := [id for id in ids if type(id) is not int]:
            raise ValueError(f"{path}: eos_token_id={wrong[0]!r:.40} must be the id of a token, or a list of ids")
        named += ids
    own = () if named and tokenizer.eos_token_id is None else stop_tokens(tokenizer, ())
    return tuple(dict.fromkeys([*named, *own]))
