"""`exact`: the response, without surrounding white space, equals the truth. For custom tasks."""

from __future__ import annotations

from typing import Any

from engine.verify.shown import shown
from engine.verify.verdict import Verdict, Verifier


def verify(response: str, truth: str) -> Verdict:
    """Whether response and truth are equal, case-sensitively, without surrounding white space."""
    if response.strip() == truth.strip():
        return Verdict(True, "equal to the truth")
    return Verdict(False, "empty" if not response.strip() else "differs from the truth")


def check(truth: Any) -> None:
    """Raises ValueError unless `truth` is text that is not blank; a blank one would reward empty responses."""
    if not isinstance(truth, str) or not truth.strip():
        raise ValueError(f"truth={shown(truth)} must be a string that is not blank; give the expected response")


EXACT = Verifier("exact", verify, check, judge=verify, inline=True)
