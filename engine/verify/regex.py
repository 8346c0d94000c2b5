"""`regex`: a pattern matches somewhere in the response. For custom tasks.

A pattern may take forever to compile or to match, or all memory: both happen in a worker, whose time and memory are limited.
"""

from __future__ import annotations

from typing import Any

import regex

from engine.verify.pool import alone
from engine.verify.shown import shown
from engine.verify.verdict import Verdict, Verifier

LIMIT_S = 1.0  # to match
COMPILE_LIMIT_S = 5.0  # to import the library, and to compile and match
LONGEST = 1000  # characters of a pattern


def verify(response: str, truth: str) -> Verdict:
    """Whether the pattern `truth` matches anywhere in `response`; use \\A…\\Z to match all of it. Thread-safe."""
    return alone(REGEX, response, truth)


def judge(response: str, truth: str) -> Verdict:
    """`verify` in this process, with a time limit for matching only."""
    try:
        found = regex.search(truth, response, timeout=LIMIT_S)
    except TimeoutError:
        return Verdict(False, f"time limit of {LIMIT_S:g} s")
    return Verdict(found is not None, "found" if found else "not found")


def check(truth: Any) -> None:
    """Raises ValueError unless `truth` is a pattern that does not match the empty string, which would reward empty responses."""
    if not isinstance(truth, str) or len(truth) > LONGEST:
        raise ValueError(f"truth={shown(truth)} must be a string of at most {LONGEST} characters; give a regular expression")
    answer = alone(USABLE, "", truth)
    if not answer.correct:
        raise ValueError(f"truth={shown(truth)} is not usable: {answer.reason}")


def _judge_pattern(response: str, truth: str) -> Verdict:
    """Whether `truth` is a pattern that does not match `response`, which is empty."""
    try:
        found = regex.search(truth, response, timeout=LIMIT_S)
    except regex.error as error:
        return Verdict(False, f"it is not a valid pattern: {error}")
    except RecursionError:
        return Verdict(False, "it is nested too deeply; give a simpler pattern")
    except TimeoutError:
        return Verdict(False, f"time limit of {LIMIT_S:g} s; give a simpler pattern")
    return Verdict(not found, "it matches an empty response; give a pattern that does not" if found else "compiles")


REGEX = Verifier("regex", verify, check, judge=judge, limit_s=COMPILE_LIMIT_S)
USABLE = Verifier("regex", verify, check, judge=_judge_pattern, limit_s=COMPILE_LIMIT_S)
