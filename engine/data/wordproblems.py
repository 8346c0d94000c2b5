"""Generate arithmetic word problems with worked answers, which small models can learn and the gsm8k verifier can check."""

from __future__ import annotations

import json
import os
import random
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

_NAMES = ("Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe")
_ITEMS = ("apples", "books", "cards", "coins", "cups", "eggs", "pens", "shells")
_PHRASES = {
    "+": ("buys {}", "finds {}", "gets {} more"),
    "-": ("loses {}", "sells {}", "gives {} away"),
    "*": ("doubles them",),
}
_MISTAKEN = {"+": "-", "-": "+", "*": "+"}

Skeleton = tuple[int, tuple[tuple[str, int], ...]]  # start, and (operator, operand) of each step


@dataclass(frozen=True)
class Kind:
    """Difficulty of problems."""

    steps: Mapping[int, int]  # number of operations -> relative frequency
    start: int  # the first number is in 2..start
    largest: int  # all intermediate results are in 1..largest
    distinct: bool = False  # no operand occurs twice, so that the last one used identifies the next step


SHORT = Kind(steps={1: 15, 2: 40, 3: 45}, start=25, largest=39)
LONG = Kind(steps={3: 1, 4: 1}, start=60, largest=99, distinct=True)  # a model of few layers cannot solve these without intermediate steps

Rows = Callable[[int, int, bool], list[dict[str, Any]]]  # (count, seed, held_out) -> rows


def problems(count: int, seed: int, held_out: bool = False) -> list[dict[str, Any]]:
    """`count` rows {"messages": [user, assistant]}, a function of the arguments. The answer is the last number of the assistant's text.

    Held-out problems are disjoint from the others: a tenth of all skeletons (start, operators, operands) is reserved for them.
    """
    draw, rows = random.Random(seed), []
    for skeleton in islice(_skeletons(draw, held_out), count):
        question, answer = _question(draw, skeleton), _answer(skeleton, _values(skeleton))
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def pairs(count: int, seed: int, held_out: bool = False) -> list[dict[str, Any]]:
    """`count` rows {"prompt", "chosen", "rejected"}, a function of the arguments: a correct worked answer, and one with a wrong step.

    The error is carried through the following steps.
    """
    draw, rows = random.Random(seed), []
    for skeleton in islice(_skeletons(draw, held_out), count):
        question = _question(draw, skeleton)
        rows.append({"prompt": question, "chosen": _answer(skeleton, _values(skeleton)), "rejected": _wrong(draw, skeleton)})
    return rows


def demonstrations(
    count: int, seed: int, held_out: bool = False, *, kind: Kind = SHORT, terse: float = 0.55, careless: float = 0.05
) -> list[dict[str, Any]]:
    """Like `problems`, with answers of mixed quality: a share `terse` without steps, a share `careless` with a wrong step, others correct.

    SFT imitates all three; RLVR can reinforce the correct ones.
    """
    draw, rows = random.Random(seed), []
    for skeleton in islice(_skeletons(draw, held_out, kind), count):
        question, values, quality = _question(draw, skeleton), _values(skeleton), draw.random()
        if quality < terse:
            answer = f"Answer: {values[-1]}"
        else:
            answer = _wrong(draw, skeleton) if quality < terse + careless else _answer(skeleton, values)
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def tasks(count: int, seed: int, held_out: bool = False, *, kind: Kind = SHORT) -> list[dict[str, Any]]:
    """`count` rows {"prompt", "truth"}, a function of the arguments. The truth is a number, for the verifier gsm8k."""
    draw, rows = random.Random(seed), []
    for skeleton in islice(_skeletons(draw, held_out, kind), count):
        rows.append({"prompt": _question(draw, skeleton), "truth": str(_values(skeleton)[-1])})
    return rows


def words() -> list[str]:
    """All words, digits and symbols in problems and answers."""
    phrases = " ".join(text.format("") for texts in _PHRASES.values() for text in texts)
    known = {
        *_NAMES,
        *_ITEMS,
        *phrases.split(),
        *["has", "and", "How", "many", "does", "have", "now", "Answer"],
        *"0123456789",
        *".,?:=+-*",
    }
    return sorted(known)


def write(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as a .jsonl file."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def generated(path: Path, count: int, seed: int, held_out: bool = False, make: Rows = problems) -> str:
    """The path of a .jsonl file with the rows of `make(count, seed, held_out)`, which is written if it does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as work:
            write(work.name, make(count, seed, held_out))
        os.replace(work.name, path)  # atomic, because several ranks may write the same rows
    return str(path)


def _skeletons(draw: random.Random, held_out: bool, kind: Kind = SHORT) -> Iterator[Skeleton]:
    while True:
        skeleton = _skeleton(draw, kind)
        if _is_held_out(skeleton) == held_out:
            yield skeleton


def _skeleton(draw: random.Random, kind: Kind) -> Skeleton:
    while True:
        start = draw.randint(2, kind.start)
        operators = draw.choices("+-*", (4, 4, 1), k=draw.choices(tuple(kind.steps), tuple(kind.steps.values()))[0])
        skeleton = start, tuple((operator, 2 if operator == "*" else draw.randint(2, 9)) for operator in operators)
        operands = [operand for operator, operand in skeleton[1] if operator != "*"]
        repeats = kind.distinct and len(set(operands)) < len(operands)
        if not repeats and all(1 <= value <= kind.largest for value in _values(skeleton)):
            return skeleton


def _values(skeleton: Skeleton, slip: tuple[int, int] = (-1, 0)) -> list[int]:
    """The start and the result of every step. slip = (i, error) adds `error` to the result of step i."""
    values = [skeleton[0]]
    for i, (operator, operand) in enumerate(skeleton[1]):
        value = values[-1]
        result = value + operand if operator == "+" else value - operand if operator == "-" else value * operand
        values.append(result + (slip[1] if i == slip[0] else 0))
    return values


def _wrong(draw: random.Random, skeleton: Skeleton) -> str:
    """A worked answer with one error that is carried through: a wrong result, a wrong operation, or a wrong operand."""
    start, steps = skeleton
    while True:
        i, slip = draw.randrange(len(steps)), draw.choice((-10, -2, -1, 1, 2, 10))
        operator, operand = steps[i]
        misread = ((_MISTAKEN[operator], operand), (operator, draw.randint(2, 9)))
        others = [(start, (*steps[:i], step, *steps[i + 1 :])) for step in misread]
        worked, values = draw.choice([(skeleton, _values(skeleton, (i, slip))), *((other, _values(other)) for other in others)])
        if min(values) >= 1 and values[-1] != _values(skeleton)[-1]:
            return _answer(worked, values)


def _is_held_out(skeleton: Skeleton) -> bool:
    start, steps = skeleton
    text = str(start) + "".join(f"{operator}{operand}" for operator, operand in steps)
    return zlib.crc32(text.encode()) % 10 == 0


def _question(draw: random.Random, skeleton: Skeleton) -> str:
    start, steps = skeleton
    name, items = draw.choice(_NAMES), draw.choice(_ITEMS)
    events = [f"has {start} {items}"] + [draw.choice(_PHRASES[operator]).format(operand) for operator, operand in steps]
    return f"{name} {', '.join(events[:-1])} and {events[-1]}. How many {items} does {name} have now?"


def _answer(skeleton: Skeleton, values: list[int]) -> str:
    steps = [f"{values[i]} {operator} {operand} = {values[i + 1]}." for i, (operator, operand) in enumerate(skeleton[1])]
    return f"{' '.join(steps)} Answer: {values[-1]}"
