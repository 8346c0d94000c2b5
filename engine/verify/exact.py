"""The whole response, less surrounding white space, is the truth: for users' own tasks."""

from __future__ import annotations

from typing import Any

from engine.verify.verdict import Verdict, Verifier


def verify(response: str, truth: str) -> Verdict:
    """Letter by letter, case included."""
    if response.strip() == truth.strip():
        return Verdict(True, "equal to the truth")
    return Verdict(False, "empty" if not response.strip() else "differs from the truth")


def check(truth: Any) -> None:
    """Raises ValueError unless `truth` is text: an empty one would reward silence."""
    if not isinstance(truth, str) or not truth.strip():
        raise ValueError(f"truth={truth!r} must be a string that is not blank: what the response has to be")


EXACT = Verifier("exact", verify, check, judge=verify, inline=True)
