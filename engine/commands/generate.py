"""python -m engine generate: generate responses to one question, or to every prompt of a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.commands.arguments import SETTING, add_model, examples
from engine.commands.terminal import printable
from engine.config import Model, Parallel, override
from engine.data.rows import Source, read_rows, whole_file
from engine.rollout.config import RolloutConfig

if TYPE_CHECKING:
    from engine.distributed.world import World
    from engine.rollout.engine import Response
    from engine.types import Prompt

BLOCK = 1024  # prompts that are processed at a time and held in memory
OPTIONS = ("n", "temperature", "top-p", "top-k", "max-tokens", "seed")  # settings that can also be given as options, such as --n 4
USAGE = 'python -m engine generate MODEL "What is 2 + 3?"'


@dataclass(frozen=True)
class GenerateConfig:
    """The settings of `generate`."""

    model: Model
    parallel: Parallel = field(default_factory=Parallel)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    n: int = 1  # responses per prompt
    max_tokens: int = 256  # of a response
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # sample from the k most likely tokens; 0: all
    top_p: float = 1.0  # sample from the most likely tokens with this total probability; 1: all
    stop: tuple[str, ...] = ()  # tokens that end a response, in addition to those of engine/data/stops.py
    seed: int = 0
    chat_template: str = ""  # "tulu", "chatml" or jinja text; "": the tokenizer's own

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1")
        if self.rollout.generator_gpus:
            raise ValueError(f"rollout.generator_gpus={self.rollout.generator_gpus} is for training runs; use 0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, USAGE)
    parser.add_argument(
        "overrides", nargs="*", metavar="question | name=value", help="a question in quotes, and settings, such as n=4 temperature=0.7"
    )
    parser.add_argument("--prompts", help='a .jsonl file; a row has "tokens", "messages" or "prompt"')
    parser.add_argument("--out", help='the .jsonl file to write: {"tokens", "prompt_length", "logprobs", "finish_reason", "text"}')
    for name in OPTIONS:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    settings = """settings:
  n=1              responses per prompt
  temperature=1.0  0: greedy decoding
  top_p=1.0        sample from the most likely tokens with this total probability (1: all)
  top_k=0          sample from the k most likely tokens (0: all)
  max_tokens=256   maximum number of tokens in a response
  seed=0           the same seed gives the same responses on any parallel layout
  parallel.tp=1    tensor parallelism; also parallel.pp, chat_template, stop, rollout.kv_cache_gb, ..."""
    parser.epilog = examples(
        'generate smollm2-135m-instruct "What is 2 + 3?" temperature=0',
        "generate runs/mine/export --prompts prompts.jsonl --out responses.jsonl n=4 temperature=0.7 max_tokens=512",
        note=settings,
    )


def main(arguments: argparse.Namespace) -> None:
    questions = [] if arguments.prompts else [word for word in arguments.overrides if not SETTING.match(word)]
    if bool(arguments.prompts) != bool(arguments.out) or (not arguments.prompts and len(questions) != 1):
        raise ValueError(f"generate takes one question in quotes, or --prompts and --out; for example: {USAGE}")
    options = {name.replace("-", "_"): getattr(arguments, name.replace("-", "_")) for name in OPTIONS}
    settings = [f"{name}={value}" for name, value in options.items() if value is not None]
    settings += [word for word in arguments.overrides if word not in questions]
    generating = override(GenerateConfig(Model(arguments.model)), settings)
    from engine.distributed.world import World

    with closing(World.start()) as world:
        if arguments.prompts:
            count = answer_all(generating, arguments.prompts, Path(arguments.out), world)
            lines = [f"{count} responses -> {arguments.out}"]
        else:
            lines = answer(generating, questions[0], world)
        if world.rank == 0:
            text = "\n\n".join(lines)
            print(printable(text) if sys.stdout.isatty() else text)


def answer(generating: GenerateConfig, question: str, world: World) -> list[str]:
    """Return the texts of the responses to one question."""
    with closing(Generator(generating, world)) as generator:
        return [generator.text(response) for _, response in generator([{"prompt": question}])]


def answer_all(generating: GenerateConfig, prompts: str, out: Path, world: World) -> int:
    """Generate responses to each row of the .jsonl file `prompts`, write them to `out` in order, and return their number.

    Input rows have `tokens` (ids of a prompt), `messages` or `prompt`. Output rows are {"tokens", "prompt_length", "logprobs",
    "finish_reason", "text"}; logprobs are natural logarithms, one per token of the response. `out` is created when all rows are complete.
    Raises ValueError, naming the line, for a row with none of these fields or with a prompt that is too long.
    """
    count = 0
    with closing(Generator(generating, world)) as generator, whole_file(out, world.rank == 0) as file:
        rows = read_rows(Source(prompts))
        while block := list(islice(rows, BLOCK)):
            where, batch = zip(*block, strict=True)
            lines = [generator.line(*pair) for pair in generator(batch, where, count)]
            count += len(block)
            if file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return count * generating.n


class Generator:
    """A loaded model that generates responses to rows."""

    def __init__(self, generating: GenerateConfig, world: World):
        from engine.data.prepare import fitting_tokenizer
        from engine.data.stops import stop_tokens
        from engine.data.template import ChatTemplate
        from engine.megatron.policy import Policy
        from engine.rollout.engine import SamplingParams

        self.generating = generating
        self.policy = Policy(generating.model, None, generating.parallel, world)
        try:
            self.policy.expect_head("lm")
            self.tokenizer = fitting_tokenizer(generating.model, self.policy.folder, self.policy.model.vocab)
            self.chat = ChatTemplate(self.tokenizer, generating.chat_template or None)
            stop = stop_tokens(self.chat, self.policy.folder, generating.stop)
            self.sampling = SamplingParams(generating.max_tokens, stop, generating.temperature, generating.top_k, generating.top_p)
        except ValueError:
            self.close()
            raise

    def close(self) -> None:
        """Free the model."""
        self.policy.close()

    def __call__(self, rows: Sequence[dict[str, Any]], where: Sequence[str] = (), first: int = 0) -> Iterator[tuple[Prompt, Response]]:
        """Yield (prompt, response) for each response to each row, in order.

        where   location of each row, for error messages
        first   id of the first prompt; ids seed the sampling
        """
        from engine.rollout.sampler import generate

        prompts = [self._prompt(row, first + i, where[i] if where else "the question") for i, row in enumerate(rows)]
        responses = generate(
            self.policy, prompts, self.sampling, self.generating.rollout, samples=self.generating.n, seed=(self.generating.seed,)
        )
        return ((prompt, response) for prompt, group in zip(prompts, responses, strict=True) for response in group)

    def _prompt(self, row: dict[str, Any], number: int, where: str) -> Prompt:
        from engine.types import Prompt

        try:
            tokens = self.chat.prompt_row(row)
            room = self.policy.model.max_length - self.generating.max_tokens
            if len(tokens) > room:
                raise ValueError(
                    f"the prompt has {len(tokens)} tokens, and max_tokens={self.generating.max_tokens} leaves room for {room}; "
                    "shorten it or lower max_tokens"
                )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return Prompt(tokens, id=number)

    def text(self, response: Response) -> str:
        """Decode a response, without its stop token."""
        from engine.rollout.sampler import text_of

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
