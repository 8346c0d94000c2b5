"""python -m engine score: compute log-probabilities or rewards of given rows, in the same order."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.commands.arguments import add_model, add_settings, examples
from engine.config import Model, Parallel, override
from engine.data.rows import Source, read_rows, whole_file

if TYPE_CHECKING:
    from engine.data.template import ChatTemplate
    from engine.distributed.world import World
    from engine.megatron.policy import Policy
    from engine.types import Sample


@dataclass(frozen=True)
class ScoreConfig:
    """The settings of `score`."""

    model: Model
    parallel: Parallel = field(default_factory=Parallel)
    tokens_per_microbatch: int = 8192
    chat_template: str = ""  # "tulu", "chatml" or jinja text; "": the tokenizer's own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "python -m engine score MODEL --data ROWS.jsonl --out SCORES.jsonl")
    parser.add_argument("--data", required=True, help='a .jsonl file; a row has "tokens", or "messages", or "prompt" and "response"')
    parser.add_argument("--out", required=True, help='the .jsonl file to write: {"tokens", "logprobs", "mask"} for each row, in order')
    parser.add_argument(
        "--reward", action="store_true", help='the model is a reward model: write {"reward", "tokens"} for each row instead'
    )
    add_settings(parser, "parallel.tp=2 tokens_per_microbatch=16384")
    parser.epilog = examples(
        "score runs/mine/export --data rows.jsonl --out scores.jsonl",
        "score runs/reward/export --reward --data rows.jsonl --out rewards.jsonl parallel.tp=2",
    )


def main(arguments: argparse.Namespace) -> None:
    scoring = override(ScoreConfig(Model(arguments.model)), arguments.overrides)
    from engine.distributed.world import World

    with closing(World.start()) as world:
        count = score(scoring, arguments.data, Path(arguments.out), world, reward=arguments.reward)
        if world.rank == 0:
            print(f"{count} rows -> {arguments.out}")


def score(scoring: ScoreConfig, data: str, out: Path, world: World, *, reward: bool = False) -> int:
    """Score every row of the .jsonl file `data`, write the results to `out` in order, and return their number.

    Output rows are {"tokens", "logprobs", "mask"}: logprobs[t] is the natural logarithm of the probability of tokens[t + 1] given the
    tokens before it, and mask[t] whether training would include it in the loss. With `reward` they are {"reward", "tokens"}: the output of
    a reward model at the row's last token. `out` is created when all rows are complete.
    Raises ValueError, naming the line, for a row that cannot be read or is longer than a microbatch, and for a model with the wrong head.
    """
    from engine.megatron.policy import Policy
    from engine.rollout.scoring import score_samples

    with closing(Policy(scoring.model, None, scoring.parallel, world)) as policy:
        policy.expect_head("scalar" if reward else "lm")
        evaluate, line = (policy.values, _reward_line) if reward else (policy.logprobs, _line)
        rows = _samples(data, _Encoder(scoring, policy, reward), scoring.tokens_per_microbatch)
        count = 0
        with whole_file(out, world.rank == 0) as file:
            for block, values in score_samples(policy, evaluate, rows, scoring.tokens_per_microbatch):
                count += len(block)
                if file:
                    file.writelines(map(line, block, values))
        return count


class _Encoder:
    """Encodes rows; loads the tokenizer at the first row of text. `whole`: include the last token in the model's input."""

    def __init__(self, scoring: ScoreConfig, policy: Policy, whole: bool):
        self.scoring, self.policy, self.whole = scoring, policy, whole

    @cached_property
    def chat(self) -> ChatTemplate:
        from engine.data.prepare import open_chat

        return open_chat(self.scoring.model, self.policy.folder, self.policy.model.vocab, self.scoring.chat_template)

    def __call__(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        from engine.data.messages import given, read_whole

        ids = "tokens" in row
        encoded = given(row["tokens"], row.get("mask"), self.policy.model.vocab) if ids else self.chat.encode_row(row)
        return read_whole(*encoded) if self.whole else encoded


def _samples(data: str, encode: _Encoder, budget: int) -> Iterator[Sample]:
    from engine.types import Sample

    for where, row in read_rows(Source(data)):
        try:
            tokens, mask = encode(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if len(mask) > budget:
            raise ValueError(f"{where} has {len(mask)} tokens, more than tokens_per_microbatch={budget}; raise it, or shorten the row")
        yield Sample(tokens, mask)


def _line(sample: Sample, logprobs: np.ndarray) -> str:
    return json.dumps({"tokens": sample.tokens.tolist(), "logprobs": logprobs.tolist(), "mask": sample.mask.tolist()}) + "\n"


def _reward_line(sample: Sample, values: np.ndarray) -> str:
    return json.dumps({"reward": float(values[-1]), "tokens": sample.tokens[:-1].tolist()}) + "\n"
