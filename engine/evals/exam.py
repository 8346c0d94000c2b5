"""The questions of an evaluation: settings and rows in, tokens and verifiers out, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from engine.config import Model, Parallel
from engine.data.rows import Source
from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer
from engine.distributed.world import World
from engine.evals.generation import Decoding
from engine.evals.suite import Item, Suite, suite
from engine.megatron.policy import read_shape
from engine.models.hub import resolve
from engine.rollout.config import RolloutConfig
from engine.verify import Verifier, verifier
from engine.verify.code import UNSAFE_CODE


@dataclass(frozen=True)
class EvalConfig:
    """What an evaluation needs to know besides its suites. None: as the suite has it."""

    model: Model
    parallel: Parallel = field(default_factory=Parallel)
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(prefix_caching=True))
    seed: int = 0
    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    chat_template: str = ""  # "tulu", "chatml" or Jinja source; "": the tokenizer's own
    unsafe_code: bool = False  # run programs without isolation from this machine
    tokens_per_microbatch: int = 8192  # of log-probabilities

    def decoding(self, suite_: Suite) -> Decoding | None:
        """The suite's, with what is set here instead; None where its items have choices."""
        if suite_.decoding is None:
            return None
        given = {"n": self.samples, "temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return replace(suite_.decoding, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Exam:
    """A suite's questions as tokens, where each was read, and who judges the answers."""

    suite: Suite
    decoding: Decoding | None
    verifiers: list[Verifier]
    source: Source
    chat: bool
    where: list[str]
    items: list[Item]
    prompts: list[np.ndarray]  # int32 [L] each
    choices: list[list[np.ndarray]]
    decode: Callable[[np.ndarray], str]

    def asked(self, number: int) -> str:
        """What the model reads, control tokens and all."""
        return self.decode(self.prompts[number])


def prepare(
    settings: EvalConfig, names: Sequence[str], data: Mapping[str, str], limit: int, chat: bool | None, world: World
) -> tuple[Path, list[Exam]]:
    """The model's folder, and the questions of all suites, before any weight is read.

    `data` says where a suite's rows are instead of on Hugging Face; `limit` takes the first items only (0: all); `chat` asks by the chat
    template, None where there is one. Raises ValueError for an unknown suite, missing data, a row that does not fit its suite or has a
    truth that nothing can be judged by, no model, and a grid that cannot hold it.
    """
    suites = [suite(name) for name in names]
    if strange := data.keys() - set(names):
        raise ValueError(f"--data names {', '.join(sorted(strange))}, not among the suites {', '.join(names)}")
    folder = world.rank0_first(lambda: resolve(settings.model.path))
    settings.parallel.check(read_shape(folder), world.size)
    template = ChatTemplate(load_tokenizer(settings.model.tokenizer or str(folder)), settings.chat_template or None)
    by_chat = bool(template.text) if chat is None else chat
    return folder, [_exam(settings, each, _source(each, data), limit, template, by_chat) for each in suites]


def _source(suite_: Suite, data: Mapping[str, str]) -> Source:
    path = data.get(suite_.name, suite_.source.path)
    return suite_.source if path == suite_.source.path else replace(suite_.source, path=path, name="")


def _exam(settings: EvalConfig, suite_: Suite, source: Source, limit: int, template: ChatTemplate, chat: bool) -> Exam:
    decoding = settings.decoding(suite_)
    verifiers = [UNSAFE_CODE if settings.unsafe_code and name == "code" else verifier(name) for name in suite_.verifiers]
    where, items = [], []
    for place, row in islice(suite_.rows(source), limit or None):
        try:
            item = suite_.item(row, chat)
            for each in verifiers:
                each.check(item.truth)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            told = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{place} is not a row of suite {suite_.name}: {told}; it has {', '.join(row)}") from None
        where.append(place)
        items.append(item)
    prompts = [template.prompt(item.messages()) if chat else template.plain(item.text()) for item in items]
    between = "" if chat else " "
    choices = [[template.plain(between + choice, continued=True) for choice in item.choices] for item in items]
    return Exam(suite_, decoding, verifiers, source, chat, where, items, prompts, choices, template.tokenizer.decode)  # type: ignore[arg-type]
