"""Log-probabilities, or rewards, of given text: rows in, rows out, in the same order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import Model, Parallel
from engine.data.rows import Source, read_rows, whole_file
from engine.data.template import ChatTemplate, given, read_whole
from engine.data.tokenizer import load_tokenizer
from engine.distributed.world import World
from engine.megatron.policy import Policy
from engine.rollout.scoring import score_samples
from engine.types import Sample


@dataclass(frozen=True)
class ScoreConfig:
    """What `score` needs to know besides its rows."""

    model: Model
    parallel: Parallel = field(default_factory=Parallel)
    tokens_per_microbatch: int = 8192
    chat_template: str = ""  # "tulu", "chatml" or jinja text; "": the tokenizer's own


def score(scoring: ScoreConfig, data: str, out: Path, world: World, *, reward: bool = False) -> int:
    """Write {"tokens", "logprobs", "mask"} for every row of the .jsonl file `data`, and return how many; `out` appears when all are done.

    logprobs[t] is the natural-log probability of tokens[t + 1] given those before it; mask[t] whether training would count it.
    With `reward`: {"reward", "tokens"}, what a reward model says of the row after its last token.
    Raises ValueError, naming the line, for a row that cannot be read or is longer than a microbatch, and for a model of the other kind.
    """
    with closing(Policy(scoring.model, None, scoring.parallel, world)) as policy:
        policy.expect_head("scalar" if reward else "lm")
        verb, line = (policy.values, _reward_line) if reward else (policy.logprobs, _line)
        rows = _samples(data, _Encoder(scoring, policy, reward), scoring.tokens_per_microbatch)
        count = 0
        with whole_file(out, world.rank == 0) as file:
            for block, values in score_samples(policy, verb, rows, scoring.tokens_per_microbatch):
                count += len(block)
                if file:
                    file.writelines(map(line, block, values))
        return count


class _Encoder:
    """Rows of ids need no tokenizer; the first row of text fetches it. `whole`: the model is to read the last token too."""

    def __init__(self, scoring: ScoreConfig, policy: Policy, whole: bool):
        self.scoring, self.policy, self.whole = scoring, policy, whole

    @cached_property
    def chat(self) -> ChatTemplate:
        tokenizer = load_tokenizer(self.scoring.model.tokenizer or str(self.policy.folder))
        return ChatTemplate(tokenizer, self.scoring.chat_template or None)

    def __call__(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        ids = "tokens" in row
        encoded = given(row["tokens"], row.get("mask"), self.policy.model.vocab) if ids else self.chat.encode_row(row)
        return read_whole(*encoded) if self.whole else encoded


def _samples(data: str, encode: _Encoder, budget: int) -> Iterator[Sample]:
    for where, row in read_rows(Source(data)):
        try:
            tokens, mask = encode(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if len(mask) > budget:
            raise ValueError(f"{where} has {len(mask)} tokens, over tokens_per_microbatch={budget}; raise it, or shorten the row")
        yield Sample(tokens, mask)


def _line(sample: Sample, logprobs: np.ndarray) -> str:
    return json.dumps({"tokens": sample.tokens.tolist(), "logprobs": logprobs.tolist(), "mask": sample.mask.tolist()}) + "\n"


def _reward_line(sample: Sample, values: np.ndarray) -> str:
    return json.dumps({"reward": float(values[-1]), "tokens": sample.tokens[:-1].tolist()}) + "\n"
