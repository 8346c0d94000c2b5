"""Prepare the questions of an evaluation: tokenize prompts and check ground truths before any weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from engine.config import Model, Parallel
from engine.data.prepare import open_chat
from engine.data.rows import Source
from engine.data.stops import stop_tokens
from engine.data.template import ChatTemplate
from engine.distributed.world import World
from engine.evals.generation import Decoding
from engine.evals.suite import Item, Suite, suite
from engine.models.families import read_shape
from engine.models.hub import resolve
from engine.rollout.config import RolloutConfig
from engine.verify import Verifier, verifier
from engine.verify.code import UNSAFE_CODE


@dataclass(frozen=True)
class EvalConfig:
    """Settings of an evaluation. None means the default of each suite."""

    model: Model
    parallel: Parallel = field(default_factory=Parallel)
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(prefix_caching=True))
    seed: int = 0
    samples: int | None = None  # responses per prompt
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None  # of a response
    chat_template: str = ""  # "tulu", "chatml" or Jinja source; "": the tokenizer's own
    unsafe_code: bool = False  # run generated programs without a sandbox
    tokens_per_microbatch: int = 8192  # when scoring multiple-choice answers

    def decoding(self, suite_: Suite, chat: bool) -> Decoding | None:
        """The suite's decoding settings, overridden by those set here. None for multiple-choice suites.

        By chat, there are no stop strings: the end of the turn ends a response, which may contain any text before that.
        """
        if suite_.decoding is None:
            return None
        base = replace(suite_.decoding, stop=()) if chat else suite_.decoding
        overrides = {"n": self.samples, "temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return replace(base, **{name: value for name, value in overrides.items() if value is not None})


@dataclass(frozen=True)
class Exam:
    """A suite's tokenized questions, with the source row of each and the verifiers of the answers."""

    suite: Suite
    decoding: Decoding | None
    verifiers: list[Verifier]
    source: Source
    chat: bool
    where: list[str]
    items: list[Item]
    prompts: list[np.ndarray]  # int32 [L] each
    choices: list[list[np.ndarray]]
    stop: tuple[int, ...]  # ids that end a response
    decode: Callable[[np.ndarray], str]

    def prompt_text(self, number: int) -> str:
        """The text of a prompt, control tokens included."""
        return self.decode(self.prompts[number])


def prepare(
    settings: EvalConfig, names: Sequence[str], data: Mapping[str, str], limit: int, chat: bool | None, world: World
) -> tuple[Path, list[Exam]]:
    """The model's folder and the questions of all suites. Loads no weights.

    data: paths that replace a suite's Hugging Face source, by suite name. limit: use only the first items; 0: all. chat: whether to use
    the chat template; None: if there is one. Raises ValueError for an unknown suite, missing data, a row or ground truth that the suite
    cannot use, a missing model, and a parallel layout that does not fit the model.
    """
    suites = [suite(name) for name in names]
    if unknown := data.keys() - set(names):
        raise ValueError(f"--data {', '.join(sorted(unknown))}: not in --suite {','.join(names)}; add it there, or remove it here")
    folder = world.rank0_first(lambda: resolve(settings.model.path))
    shape = read_shape(folder)
    settings.parallel.check(shape, world.size)
    template = open_chat(settings.model, folder, shape.vocab, settings.chat_template)
    use_chat = bool(template.text) if chat is None else chat
    stop = stop_tokens(template, folder)
    return folder, [_exam(settings, each, _source(each, data), limit, template, use_chat, stop) for each in suites]


def _source(suite_: Suite, data: Mapping[str, str]) -> Source:
    path = data.get(suite_.name, suite_.source.path)
    return suite_.source if path == suite_.source.path else replace(suite_.source, path=path, name="")


def _exam(
    settings: EvalConfig, suite_: Suite, source: Source, limit: int, template: ChatTemplate, chat: bool, stop: tuple[int, ...]
) -> Exam:
    decoding = settings.decoding(suite_, chat)
    verifiers = [UNSAFE_CODE if settings.unsafe_code and name == "code" else verifier(name) for name in suite_.verifiers]
    where, items = [], []
    for location, row in islice(suite_.rows(source), limit or None):
        try:
            item = suite_.item(row, chat)
            for each in verifiers:
                each.check(item.truth)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            cause = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{location} is not a row of suite {suite_.name}: {cause}; it has {', '.join(row)}") from None
        where.append(location)
        items.append(item)
    prompts = [template.prompt(item.messages()) if chat else template.plain(item.text()) for item in items]
    separator = "" if chat else " "
    choices = [[template.plain(separator + choice, continued=True) for choice in item.choices] for item in items]
    return Exam(suite_, decoding, verifiers, source, chat, where, items, prompts, choices, stop, template.tokenizer.decode)  # type: ignore[arg-type]
