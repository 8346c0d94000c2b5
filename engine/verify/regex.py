"""A pattern is found in the response: for users' own tasks. The pattern is the user's, and may be one that never ends."""

from __future__ import annotations

from typing import Any

import regex

from engine.verify.verdict import Verdict, Verifier

LIMIT_S = 1.0


def verify(response: str, truth: str) -> Verdict:
    """Whether the pattern `truth` matches anywhere; one for the whole response says so: \\A…\\Z. From any thread."""
    try:
        found = regex.search(truth, response, timeout=LIMIT_S)
    except TimeoutError:
        return Verdict(False, f"time limit of {LIMIT_S:g} s")
    return Verdict(found is not None, "found" if found else "not found")


def check(truth: Any) -> None:
    """Raises ValueError unless `truth` is a pattern that asks for something: one that matches nothing at all would reward silence."""
    if not isinstance(truth, str):
        raise ValueError(f"truth={truth!r} must be a string: a pattern that the response must match")
    try:
        asks = not regex.search(truth, "", timeout=LIMIT_S)
    except regex.error as error:
        raise ValueError(f"truth={truth!r} is no pattern: {error}") from None
    if not asks:
        raise ValueError(f"truth={truth!r} is found in an empty response; write a pattern that needs something to be there")


REGEX = Verifier("regex", verify, check, judge=verify)
