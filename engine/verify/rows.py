"""Judges .jsonl rows, in order: the implementation of `python -m engine verify`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TextIO

from engine.data.rows import read_lines
from engine.verify.pool import Case, Pool
from engine.verify.shown import shown
from engine.verify.verdict import Unjudged, Verdict, Verifier

BLOCK = 2000  # rows per batch


@dataclass
class Tally:
    """Counts of verdicts."""

    correct: int = 0
    wrong: int = 0
    unjudged: int = 0

    def __str__(self) -> str:
        rows = self.correct + self.wrong + self.unjudged
        share = f" ({self.correct / (rows - self.unjudged):.1%})" if rows > self.unjudged else ""
        return f"{rows} rows: {self.correct} correct{share}, {self.wrong} wrong, {self.unjudged} not judged"


def verify_rows(verifier: Verifier, pool: Pool, lines: Iterable[bytes], out: TextIO) -> Tally:
    """Read .jsonl rows {"response", "truth"} and write {"correct", "reason"} for each; "correct" is null if the row could not be judged.

    Raises ValueError, which names the line, for an invalid row, and Unjudged like `Pool.verify`.
    """
    cases = (_case(verifier, row, where) for where, row in read_lines(lines, "stdin"))
    tally = Tally()
    while block := list(islice(cases, BLOCK)):
        out.writelines(_written(pool.verify(block), tally))
        out.flush()
    return tally


def _case(verifier: Verifier, row: dict[str, Any], where: str) -> Case:
    if not isinstance(response := row.get("response"), str):
        raise ValueError(f"{where}: response={shown(response)} must be a string")
    if "truth" not in row:
        raise ValueError(f"{where}: truth is missing; a row needs response and truth")
    try:
        verifier.check(row["truth"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Case(verifier, response, row["truth"])


def _written(answers: Iterable[Verdict | Unjudged], tally: Tally) -> Iterator[str]:
    for answer in answers:
        if isinstance(answer, Unjudged):
            tally.unjudged += 1
            row = {"correct": None, "reason": str(answer)}
        else:
            tally.correct += answer.correct
            tally.wrong += not answer.correct
            row = answer._asdict()
        yield json.dumps(row) + "\n"
