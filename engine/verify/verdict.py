"""What a verifier answers, and what it raises when it is the machine that failed."""

from __future__ import annotations

from typing import NamedTuple


class Verdict(NamedTuple):
    """One judged response; `reason` is one line for people and decides nothing."""

    correct: bool
    reason: str


class Unjudged(Exception):
    """The machine failed, not the response: no sandbox, a lost worker, a full disk.

    Such an item is tried again, then dropped and counted. It is never a wrong answer.
    """
