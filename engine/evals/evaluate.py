"""A model against suites: read the questions, get the answers, judge them, say how sure the numbers are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch.distributed as dist

from engine.config import Model, Parallel
from engine.data.rows import Source
from engine.data.template import ChatTemplate
from engine.data.tokenizer import load_tokenizer
from engine.evals.choices import choose
from engine.evals.generation import Decoding, Response, Transformers
from engine.evals.statistics import Estimate
from engine.evals.suite import Item, Scores, Suite, suite
from engine.hub import resolve
from engine.megatron.policy import Policy, dtype_of, shape_of
from engine.verify import Unjudged, Verdict, Verifier, verifier
from engine.verify.code import UNSAFE_CODE
from engine.verify.pool import Case, Pool
from engine.world import World


@dataclass(frozen=True)
class Evaluating:
    """What an evaluation needs to know besides its suites. None: as the suite has it."""

    model: Model
    parallel: Parallel = field(default_factory=Parallel)  # of log-probabilities; responses are shared out over all ranks
    seed: int = 0
    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    chat_template: str = ""  # "tulu", "chatml" or jinja text; "": the tokenizer's own
    unsafe_code: bool = False  # run programs without isolation from this machine
    tokens_per_batch: int = 32768  # rows x length of what a rank generates at once
    tokens_per_microbatch: int = 8192  # of log-probabilities

    def decoding(self, suite_: Suite) -> Decoding:
        """The suite's, with what is set here instead."""
        assert suite_.decoding is not None
        given = {"n": self.samples, "temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return replace(suite_.decoding, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Exam:
    """A suite's questions as tokens, where each was read, and who judges the answers."""

    suite: Suite
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


@dataclass(frozen=True)
class Answer:
    """What was answered to one item, and how it was judged. `verdicts[r][c]` is of case c of response r."""

    responses: list[Response]
    verdicts: list[list[Verdict | Unjudged]]
    scores: Scores | None  # None: the machine failed to judge it, and it counts nowhere


@dataclass(frozen=True)
class Result:
    """One suite, done."""

    exam: Exam
    answers: list[Answer]

    @property
    def metrics(self) -> dict[str, Estimate]:
        scores = [answer.scores for answer in self.answers if answer.scores is not None]
        names = dict.fromkeys(chain.from_iterable(scores))
        return {name: Estimate.of([score[name] for score in scores]) for name in names}

    @property
    def dropped(self) -> int:
        return sum(answer.scores is None for answer in self.answers)


def evaluate(settings: Evaluating, exams: Sequence[Exam], folder: Path, world: World) -> list[Result]:
    """Every exam's result, on rank 0; the others get an empty list. All ranks must call it."""
    writing = [exam for exam in exams if exam.suite.decoding]
    choosing = [exam for exam in exams if not exam.suite.decoding]
    found: dict[str, list[Answer]] = {}
    if writing:
        found |= _write(settings, writing, folder, world)
    if choosing:
        found |= _choose(settings, choosing, folder, world)
    return [Result(exam, found[exam.suite.name]) for exam in exams] if world.rank == 0 else []


def prepare(
    settings: Evaluating, names: Sequence[str], data: Mapping[str, str], limit: int, chat: bool | None, world: World
) -> tuple[Path, list[Exam]]:
    """The model's folder, and the questions of all suites, before any weight is read.

    `data` says where a suite's rows are instead of on Hugging Face; `limit` takes the first items only (0: all); `chat` asks by the chat
    template, None where there is one. Raises ValueError for an unknown suite, missing data, a row that does not fit its suite or has a
    truth that nothing can be judged by, no model, and a grid that cannot hold it.
    """
    suites = [suite(name) for name in names]
    if strange := data.keys() - set(names):
        raise ValueError(f"--data names {', '.join(sorted(strange))}, not among the suites {', '.join(names)}")
    folder = world.first(lambda: resolve(settings.model.path))
    settings.parallel.check(shape_of(folder), world.size)
    template = ChatTemplate(load_tokenizer(settings.model.tokenizer or str(folder)), settings.chat_template or None)
    by_chat = bool(template.text) if chat is None else chat
    return folder, [_exam(settings, each, _source(each, data), limit, template, by_chat) for each in suites]


def _source(suite_: Suite, data: Mapping[str, str]) -> Source:
    path = data.get(suite_.name, suite_.source.path)
    return suite_.source if path == suite_.source.path else replace(suite_.source, path=path, name="")


def _exam(settings: Evaluating, suite_: Suite, source: Source, limit: int, template: ChatTemplate, chat: bool) -> Exam:
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
    choices = [[template.plain(between + choice, goes_on=True) for choice in item.choices] for item in items]
    return Exam(suite_, verifiers, source, chat, where, items, prompts, choices, template.tokenizer.decode)  # type: ignore[arg-type]


def _write(settings: Evaluating, exams: Sequence[Exam], folder: Path, world: World) -> dict[str, list[Answer]]:
    tokenizer = load_tokenizer(settings.model.tokenizer or str(folder))
    model = Transformers(folder, tokenizer, world, dtype_of(settings.model, world), settings.tokens_per_batch)
    found: dict[str, list[Answer]] = {}
    for exam in exams:
        mine = range(world.rank, len(exam.items), world.size)
        responses = model.generate([exam.prompts[i].tolist() for i in mine], mine, settings.decoding(exam.suite), settings.seed)
        parts: list[list[list[Response]]] = [[] for _ in range(world.size)]
        dist.gather_object(responses, parts if world.rank == 0 else None)
        if world.rank == 0:
            found[exam.suite.name] = judged(exam, [parts[i % world.size][i // world.size] for i in range(len(exam.items))])
    return found


def judged(exam: Exam, responses: list[list[Response]]) -> list[Answer]:
    """The responses to each item of `exam`, with verdicts and scores. Raises Unjudged when the machine fails to judge 1 % of them."""
    cases = [
        [[Case(judge, *pair) for judge in exam.verifiers for pair in exam.suite.cases(item, response.text)] for response in each]
        for item, each in zip(exam.items, responses, strict=True)
    ]
    with Pool() as pool:
        flat = iter(pool.verify([case for item in cases for response in item for case in response]))
    answers = []
    for each, item in zip(responses, cases, strict=True):
        verdicts = [[next(flat) for _ in response] for response in item]
        correct = [[v.correct for v in verdict if isinstance(v, Verdict)] for verdict in verdicts]
        lost = any(isinstance(v, Unjudged) for verdict in verdicts for v in verdict)
        answers.append(Answer(each, verdicts, None if lost else exam.suite.scores(correct)))
    return answers


def _choose(settings: Evaluating, exams: Sequence[Exam], folder: Path, world: World) -> dict[str, list[Answer]]:
    model = replace(settings.model, path=str(folder))
    with closing(Policy(model, None, settings.parallel, world)) as policy:
        found = {e.suite.name: choose(policy, e.prompts, e.choices, settings.tokens_per_microbatch) for e in exams}
    return {e.suite.name: [_chosen(e.suite, *pair) for pair in zip(e.items, found[e.suite.name], strict=False)] for e in exams}


def _chosen(suite_: Suite, item: Item, logprobs: list[float]) -> Answer:
    best = int(np.argmax(logprobs))
    reason = "log-probabilities " + ", ".join(f"{choice} {value:.4f}" for choice, value in zip(item.choices, logprobs, strict=True))
    return Answer(
        [Response(item.choices[best], 1, "chosen")], [[Verdict(best == item.truth, reason)]], suite_.scores([[best == item.truth]])
    )
