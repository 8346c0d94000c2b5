"""What a suite is, and which there are. To add one, write its file and name it here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from engine.data.rows import Source, read_rows
from engine.evals.generation import Decoding

Row = dict[str, Any]
Scores = dict[str, list[float]]  # by metric; the values of one item are one cluster

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
    """One question, after examples of (question, answer), and what its answers are judged by."""

    question: str
    truth: Any
    shots: tuple[tuple[str, str], ...] = ()
    choices: tuple[str, ...] = ()  # where the model does not write but choose; truth is then the number of the right one

    def messages(self) -> list[dict[str, str]]:
        """As a conversation: the examples are turns of it."""
        turns = [text for shot in self.shots for text in shot] + [self.question]
        return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]

    def text(self) -> str:
        """As plain text, as lm-eval lays it out: an answer after one space, a blank line between examples."""
        return "".join(f"{question} {answer}\n\n" for question, answer in self.shots) + self.question


def itself(item: Item, response: str) -> list[tuple[str, Any]]:
    """The response as it is, against the item's truth."""
    return [(response, item.truth)]


def accuracy(verdicts: Sequence[Sequence[bool]]) -> Scores:
    """The share of responses that are right."""
    return {"accuracy": [float(verdict[0]) for verdict in verdicts]}


@dataclass(frozen=True)
class Suite:
    """Rows to items, items to responses, responses to scores.

    `item(row, chat)` makes an item of a row; `cases(item, response)` what each verifier is asked, as (text, truth); `scores(verdicts)` the
    numbers of one item, from a list of verdicts (for each verifier, for each case) for each of its responses.
    """

    name: str
    source: Source  # where its rows are, unless the user says otherwise
    item: Callable[[Row, bool], Item]
    decoding: Decoding | None = None  # None: its items have choices
    verifiers: tuple[str, ...] = ()
    rows: Callable[[Source], Iterator[tuple[str, Row]]] = read_rows
    cases: Callable[[Item, str], list[tuple[str, Any]]] = itself
    scores: Callable[[Sequence[Sequence[bool]]], Scores] = accuracy


def suite(name: str) -> Suite:
    """The suite of that name. Raises ValueError, listing all names, when there is none."""
    if name not in SUITES:
        raise ValueError(f"suite={name!r} is unknown; use one of {', '.join(SUITES)}")
    return resolve_name(SUITES[name])
