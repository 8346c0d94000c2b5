"""Responses to a suite's questions, by the engine's own sampler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from engine.megatron.policy import Policy
from engine.rollout.config import RolloutConfig
from engine.rollout.engine import SamplingParams
from engine.rollout.sampler import generate, stop_tokens
from engine.rollout.stopping import StopStrings
from engine.types import Prompt


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn: `n` for each prompt, greedily where `temperature` is 0, each until a stop string, eos or `max_tokens`."""

    max_tokens: int
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.n < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"max_tokens={self.max_tokens}, samples={self.n}, temperature={self.temperature} and top_p={self.top_p}: "
                "they must be at least 1, 1 and 0, and top_p in (0, 1]"
            )


class EvalResponse(NamedTuple):
    """A response without what stopped it. `finish` is "stop", or "length" where max_tokens did."""

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

    Draws are a function of (seed, place of the prompt, sample, position). Raises ValueError for a prompt that leaves no room for
    `max_tokens` in the model's context.
    """
    ends, until = end_tokens(policy.folder, tokenizer), StopStrings(tokenizer, decoding.stop)
    sampling = SamplingParams(decoding.max_tokens, ends, decoding.temperature, top_p=decoding.top_p, until=until)
    asked = [Prompt(tokens, id=place) for place, tokens in enumerate(prompts)]
    found = generate(policy, asked, sampling, rollout, samples=decoding.n, seed=(seed,))

    def told(tokens: list[int], stopped: bool) -> EvalResponse:
        written = tokens[:-1] if tokens[-1] in ends else tokens
        return EvalResponse(until.before(written), len(written), "stop" if stopped else "length")

    return [[told(response.tokens.tolist(), response.stopped) for response in group] for group in found]


def end_tokens(folder: Path | None, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ids that end a response: those that the model's folder names, and the tokenizer's eos."""
    named: list[int] = []
    for path in [folder / name for name in ("generation_config.json", "config.json")] if folder else []:
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        named += ids if isinstance(ids, list) else [] if ids is None else [ids]
    own = () if named and tokenizer.eos_token_id is None else stop_tokens(tokenizer, ())
    return tuple(dict.fromkeys([*named, *own]))
