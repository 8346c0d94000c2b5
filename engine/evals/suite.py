"""Evaluation suites. To add one, write its file and list it in SUITES."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from engine.data.rows import Source, read_rows
from engine.evals.generation import Decoding

Row = dict[str, Any]
Scores = dict[str, list[float]]  # metric -> values of one item, which form a cluster

SUITES = {
    "gsm8k": "engine.evals.gsm8k:GSM8K",
    "math": "engine.evals.math:MATH",
    "ifeval": "engine.evals.ifeval:IFEVAL",
    "humaneval": "engine.evals.humaneval:HUMANEVAL",
    "mmlu": "engine.evals.mmlu:MMLU",
    "popqa": "engine.evals.openqa:POPQA",
    "nq_open": "engine.evals.openqa:NQ_OPEN",
}


@dataclass(frozen=True)
class Item:
    """One question with its few-shot examples (question, answer) and its ground truth."""

    question: str
    truth: Any
    shots: tuple[tuple[str, str], ...] = ()
    choices: tuple[str, ...] = ()  # for multiple choice; truth is then the index of the correct one

    def messages(self) -> list[dict[str, str]]:
        """The item as a conversation, with the examples as turns."""
        turns = [text for shot in self.shots for text in shot] + [self.question]
        return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]

    def text(self) -> str:
        """The item as plain text in lm-eval's format: an answer follows one space, examples are separated by a blank line."""
        return "".join(f"{question} {answer}\n\n" for question, answer in self.shots) + self.question


def itself(item: Item, response: str) -> list[tuple[str, Any]]:
    """The default cases: the unchanged response and the item's truth."""
    return [(response, item.truth)]


def accuracy(verdicts: Sequence[Sequence[bool]]) -> Scores:
    """The default scores: whether each response is correct."""
    return {"accuracy": [float(verdict[0]) for verdict in verdicts]}


@dataclass(frozen=True)
class Suite:
    """An evaluation suite.

    `item(row, chat)` converts a row. `cases(item, response)` returns the (text, truth) pairs that each verifier judges. `scores(verdicts)`
    returns the metrics of one item, from a list of verdicts (for each verifier, for each case) for each of its responses.
    """

    name: str
    source: Source  # default source of its rows
    item: Callable[[Row, bool], Item]
    decoding: Decoding | None = None  # None: multiple choice
    verifiers: tuple[str, ...] = ()
    rows: Callable[[Source], Iterator[tuple[str, Row]]] = read_rows
    cases: Callable[[Item, str], list[tuple[str, Any]]] = itself
    scores: Callable[[Sequence[Sequence[bool]]], Scores] = accuracy


def suite(name: str) -> Suite:
    """Return the suite called `name`. Raises ValueError, which lists all names, if there is none."""
    if name not in SUITES:
        raise ValueError(f"suite={name!r} is unknown; use one of {', '.join(SUITES)}")
    return resolve_name(SUITES[name])
