"""Evaluate a model on suites: generate responses, verify them and compute metrics with standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from engine.data.prepare import tokenizer_of
from engine.distributed.world import World
from engine.evals.choices import choose
from engine.evals.exam import EvalConfig, Exam
from engine.evals.generation import EvalResponse, respond
from engine.evals.statistics import Estimate
from engine.evals.suite import Item, Scores, Suite
from engine.megatron.policy import Policy
from engine.verify import Unjudged, Verdict
from engine.verify.pool import Case, Pool


@dataclass(frozen=True)
class Answer:
    """The responses to one item and their verdicts: `verdicts[r][c]` belongs to case c of response r."""

    responses: list[EvalResponse]
    verdicts: list[list[Verdict | Unjudged]]
    scores: Scores | None  # None: a verdict is missing, and the item is excluded from the metrics


@dataclass(frozen=True)
class Result:
    """The result of one suite."""

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


def evaluate(settings: EvalConfig, exams: Sequence[Exam], folder: Path, world: World) -> list[Result]:
    """The result of every exam on rank 0, an empty list on the other ranks. All ranks must call it."""
    tokenizer = tokenizer_of(settings.model, folder)
    with closing(Policy(replace(settings.model, path=str(folder)), None, settings.parallel, world)) as policy:
        policy.expect_head("lm")
        answers = [_answers(settings, exam, policy, tokenizer) for exam in exams]
    return [Result(*pair) for pair in zip(exams, answers, strict=True)] if world.rank == 0 else []


def _answers(settings: EvalConfig, exam: Exam, policy: Policy, tokenizer: PreTrainedTokenizerFast) -> list[Answer]:
    """The answers to `exam` on rank 0, an empty list on the other ranks."""
    if exam.decoding is None:
        logprobs = choose(policy, exam.prompts, exam.choices, settings.tokens_per_microbatch)
        return [_chosen(exam.suite, *pair) for pair in zip(exam.items, logprobs, strict=False)]
    responses = respond(policy, tokenizer, exam.prompts, exam.decoding, settings.rollout, settings.seed, exam.stop)
    return judged(exam, responses) if policy.world.rank == 0 else []


def judged(exam: Exam, responses: list[list[EvalResponse]]) -> list[Answer]:
    """Verify the responses to each item and return answers with verdicts and scores. Raises Unjudged if more than 1 % cannot be judged."""
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


def _chosen(suite_: Suite, item: Item, logprobs: list[float]) -> Answer:
    best = int(np.argmax(logprobs))
    reason = "log-probabilities " + ", ".join(f"{choice} {value:.4f}" for choice, value in zip(item.choices, logprobs, strict=True))
    return Answer(
        [EvalResponse(item.choices[best], 1, "chosen")], [[Verdict(best == item.truth, reason)]], suite_.scores([[best == item.truth]])
    )
