"""The result of a verifier, and the exception for failures of the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """The result for one response. `reason` is one line for logs."""

    correct: bool
    reason: str


class Unjudged(Exception):
    """The machine failed, not the response: no sandbox, a lost worker, a full disk.

    The response is retried, then dropped and counted. It is never counted as wrong.
    """


def ruling(correct: object, reason: str) -> Verdict | Unjudged:
    """A verifier's result as a Verdict. Unjudged if `correct` is not a boolean: NaN, for example, would count as correct."""
    if correct not in (True, False):
        return Unjudged(f"its verdict is {correct!r}, neither True nor False")
    return Verdict(bool(correct), reason)


@dataclass(frozen=True)
class Verifier:
    """A verifier.

    `verify(response, truth)` is thread-safe, returns within `limit_s` for any response, and raises only Unjudged.
    `check(truth)` raises ValueError, which names the field, if `truth` is not usable; it is called once per row, at start-up.
    `judge(response, truth)` is `verify` without its own time limit: Pool runs it in workers that it can kill.
    """

    name: str
    verify: Callable[[str, Any], Verdict]
    check: Callable[[Any], None]
    judge: Callable[[str, Any], Verdict]
    limit_s: float = 10.0  # CPU time per response in a worker; a response that takes longer is wrong
    inline: bool = False  # Pool runs `judge` in its own process: for linear-time verifiers that are cheaper than a message to a worker
