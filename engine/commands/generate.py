"""Answers from any folder: prompts in, responses out, by the engine's own sampler."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from engine.config import Model, Parallel
from engine.data.rows import Source, read_rows, whole_file
from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer
from engine.distributed.world import World
from engine.megatron.policy import Policy
from engine.rollout.config import RolloutConfig
from engine.rollout.engine import Response, SamplingParams
from engine.rollout.sampler import generate, stop_tokens, text_of
from engine.types import Prompt

BLOCK = 1024  # prompts that are answered together, and held in memory


@dataclass(frozen=True)
class GenerateConfig:
    """What `answer` needs to know besides its prompts."""

    model: Model
    parallel: Parallel = field(default_factory=Parallel)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    n: int = 1  # responses to each prompt
    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # tokens that end a response, besides the tokenizer's eos
    seed: int = 0
    chat_template: str = ""  # "tulu", "chatml" or jinja text; "": the tokenizer's own

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1")
        if self.rollout.generator_gpus:
            raise ValueError(f"rollout.generator_gpus={self.rollout.generator_gpus} is for training runs; leave it at 0")


def answer(generating: GenerateConfig, question: str, world: World) -> list[str]:
    """The texts of the responses to one question."""
    with closing(Generator(generating, world)) as answering:
        return [answering.text(response) for _, response in answering([{"prompt": question}])]


def answer_all(generating: GenerateConfig, prompts: str, out: Path, world: World) -> int:
    """Write {"tokens", "prompt_length", "logprobs", "finish_reason", "text"} for each response to each row of the .jsonl file `prompts`, in
    order, and return how many; `out` appears when all are done.

    Rows have `tokens` (ids of a prompt), `messages` or `prompt`. logprobs are natural logs, one for each token of the response.
    Raises ValueError, naming the line, for a row that has none of these or whose prompt is too long.
    """
    count = 0
    with closing(Generator(generating, world)) as answering, whole_file(out, world.rank == 0) as file:
        rows = read_rows(Source(prompts))
        while block := list(islice(rows, BLOCK)):
            where, asked = zip(*block, strict=True)
            lines = [answering.line(*pair) for pair in answering(asked, where, count)]
            count += len(block)
            if file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return count * generating.n


class Generator:
    """A model that answers."""

    def __init__(self, generating: GenerateConfig, world: World):
        self.generating = generating
        self.policy = Policy(generating.model, None, generating.parallel, world)
        try:
            self.policy.expect_head("lm")
            self.tokenizer = load_tokenizer(generating.model.tokenizer or str(self.policy.folder))
            self.chat = ChatTemplate(self.tokenizer, generating.chat_template or None)
            stop = stop_tokens(self.tokenizer, generating.stop)
            self.sampling = SamplingParams(generating.max_tokens, stop, generating.temperature, generating.top_k, generating.top_p)
        except ValueError:
            self.close()
            raise

    def close(self) -> None:
        """Let the model go."""
        self.policy.close()

    def __call__(self, rows: Sequence[dict[str, Any]], where: Sequence[str] = (), first: int = 0) -> Iterator[tuple[Prompt, Response]]:
        """Each row's prompt with each of its responses, in order. Prompts are numbered from `first`, which their noise depends on."""
        prompts = [self._prompt(row, first + i, where[i] if where else "the question") for i, row in enumerate(rows)]
        responses = generate(
            self.policy, prompts, self.sampling, self.generating.rollout, samples=self.generating.n, seed=(self.generating.seed,)
        )
        return ((prompt, response) for prompt, group in zip(prompts, responses, strict=True) for response in group)

    def _prompt(self, row: dict[str, Any], number: int, where: str) -> Prompt:
        try:
            tokens = self.chat.prompt_row(row)
            room = self.policy.model.max_length - self.generating.max_tokens
            if len(tokens) > room:
                raise ValueError(
                    f"the prompt has {len(tokens)} tokens, and max_tokens leaves room for {room}; shorten it or lower max_tokens"
                )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return Prompt(tokens, id=number)

    def text(self, response: Response) -> str:
        """What a response says, without its stop token."""
        return text_of(response, self.tokenizer)

    def line(self, prompt: Prompt, response: Response) -> dict[str, Any]:
        """One row of the output."""
        return {
            "tokens": [*prompt.tokens.tolist(), *response.tokens.tolist()],
            "prompt_length": len(prompt.tokens),
            "logprobs": response.logprobs.tolist(),
            "finish_reason": "stop" if response.stopped else "length",
            "text": self.text(response),
        }
