"""What a verifier answers, and what it raises when it is the machine that failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Verdict(NamedTuple):
    """One judged response; `reason` is one line for people and decides nothing."""

    correct: bool
    reason: str


class Unjudged(Exception):
    """The machine failed, not the response: no sandbox, a lost worker, a full disk.

    Such an item is tried again, then dropped and counted. It is never a wrong answer.
    """


def ruling(correct: object, reason: str) -> Verdict | Unjudged:
    """What a verifier said, as a verdict; one that is neither right nor wrong is the verifier's own fault: NaN would count as right."""
    if correct not in (True, False):
        return Unjudged(f"its verdict is {correct!r}, neither True nor False")
    return Verdict(bool(correct), reason)


@dataclass(frozen=True)
class Verifier:
    """One way to judge.

    `verify(response, truth)` may be called anywhere, in any thread: it comes back within `limit_s` whatever the response is, and raises
    nothing but Unjudged. `check(truth)` raises ValueError, naming the field, for a truth against which nothing can be judged: it is called
    once, at start-up. A pool runs `judge` in workers that it kills: `verify` less the guard of its own that it may have.
    """

    name: str
    verify: Callable[[str, Any], Verdict]
    check: Callable[[Any], None]
    judge: Callable[[str, Any], Verdict]
    limit_s: float = 10.0  # wall clock of one response in a worker; one that takes longer is wrong
    inline: bool = False  # judged faster than a worker is asked, and in linear time: a pool judges it where it stands
