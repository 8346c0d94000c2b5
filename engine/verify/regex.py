"""`regex`: a pattern matches somewhere in the response. For custom tasks. Matching has a time limit, because patterns may backtrack."""

from __future__ import annotations

from typing import Any

import regex

from engine.verify.verdict import Verdict, Verifier

LIMIT_S = 1.0


def verify(response: str, truth: str) -> Verdict:
    """Whether the pattern `truth` matches anywhere in `response`; use \\A…\\Z to match all of it. Thread-safe."""
    try:
        found = regex.search(truth, response, timeout=LIMIT_S)
    except TimeoutError:
        return Verdict(False, f"time limit of {LIMIT_S:g} s")
    return Verdict(found is not None, "found" if found else "not found")


def check(truth: Any) -> None:
    """Raises ValueError unless `truth` is a pattern that does not match the empty string, which would reward empty responses."""
    if not isinstance(truth, str):
        raise ValueError(f"truth={truth!r} must be a string; give a regular expression")
    try:
        nonempty = not regex.search(truth, "", timeout=LIMIT_S)
    except regex.error as error:
        raise ValueError(f"truth={truth!r} is not a valid pattern: {error}") from None
    if not nonempty:
        raise ValueError(f"truth={truth!r} matches an empty response; give a pattern that does not")


REGEX = Verifier("regex", verify, check, judge=verify)
