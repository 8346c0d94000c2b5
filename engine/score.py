"""Log-probabilities of given text: rows in, rows out, in the same order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from engine.batching import batch, scatter
from engine.config import Model, Parallel
from engine.data.rows import Source, read_rows
from engine.data.template import ChatTemplate, given
from engine.data.tokenizer import load_tokenizer
from engine.megatron.policy import Policy
from engine.types import Sample
from engine.world import World

BLOCK = 512  # rows that are planned together, and held in memory


@dataclass(frozen=True)
class Scoring:
    """What `score` needs to know besides its rows."""

    model: Model
    parallel: Parallel = field(default_factory=Parallel)
    tokens_per_microbatch: int = 8192
    chat_template: str = ""  # "tulu", "chatml" or jinja text; "": the tokenizer's own


def score(scoring: Scoring, data: str, out: Path, world: World) -> int:
    """Write {"tokens", "logprobs", "mask"} for every row of the .jsonl file `data`, and return how many; `out` appears when all are done.

    logprobs[t] is the natural-log probability of tokens[t + 1] given those before it; mask[t] whether training would count it.
    Raises ValueError, naming the line, for a row that cannot be read or is longer than a microbatch.
    """
    with closing(Policy(scoring.model, None, scoring.parallel, world)) as policy:
        rows = _samples(data, _Encoder(scoring, policy), scoring.tokens_per_microbatch)
        part = out.with_name(out.name + ".part")
        count = 0
        try:
            while block := list(islice(rows, BLOCK)):
                values = logprobs(policy, block, scoring.tokens_per_microbatch)
                count += len(block)
                if world.rank == 0:
                    with part.open("w" if count == len(block) else "a") as file:
                        file.writelines(_line(sample, value) for sample, value in zip(block, values, strict=True))
            if world.rank == 0:
                os.replace(part, out)
        finally:
            if world.rank == 0:
                part.unlink(missing_ok=True)
        return count


class _Encoder:
    """Rows of ids need no tokenizer; the first row of text fetches it."""

    def __init__(self, scoring: Scoring, policy: Policy):
        self.scoring, self.policy = scoring, policy

    @cached_property
    def chat(self) -> ChatTemplate:
        tokenizer = load_tokenizer(self.scoring.model.tokenizer or str(self.policy.folder))
        return ChatTemplate(tokenizer, self.scoring.chat_template or None)

    def __call__(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        if "tokens" in row:
            return given(row["tokens"], row.get("mask"), self.policy.model.vocab)
        return self.chat.encode_row(row)


def _samples(data: str, encode: _Encoder, budget: int) -> Iterator[Sample]:
    for where, row in read_rows(Source(data)):
        try:
            tokens, mask = encode(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if len(mask) > budget:
            raise ValueError(f"{where} has {len(mask)} tokens, over tokens_per_microbatch={budget}; raise it, or shorten the row")
        yield Sample(tokens, mask)


def logprobs(policy: Policy, samples: list[Sample], budget: int) -> list[list[float]]:
    """Each sample's log-probs, on rank 0; the others get an empty list."""
    step = batch(samples, budget, **policy.cut)
    mine = dict(enumerate(scatter(policy.logprobs(step), step, len(samples)))) if step else {}
    found = {i: values.tolist() for i, values in mine.items() if values is not None and policy.speaks}
    parts: list[dict[int, list[float]]] = [{}] * policy.world.size
    dist.gather_object(found, parts if policy.world.rank == 0 else None)
    whole = {i: values for part in parts for i, values in part.items()}
    return [whole[i] for i in range(len(samples))] if policy.world.rank == 0 else []


def _line(sample: Sample, logprobs: list[float]) -> str:
    return json.dumps({"tokens": sample.tokens.tolist(), "logprobs": logprobs, "mask": sample.mask.tolist()}) + "\n"
