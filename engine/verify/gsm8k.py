"""`gsm8k`: the last number of the response equals the last number of the truth (Tülu 3, section 6; arXiv 2411.15124).

Numbers are read as in `engine/verify/numbers.py` and compared exactly, without arithmetic: 1,000 equals 1000.0 and 1e3; 0.333 does not
equal 1/3. Differences from Tülu 3's verifier: commas are removed from both sides (otherwise a truth such as 1,000 never matches), a minus
between two numbers is not a sign ("12-5" ends in 5), and dashes and digits of all scripts are accepted.
"""

from __future__ import annotations

from typing import Any

from engine.verify.numbers import last_number, same_number
from engine.verify.shown import shown
from engine.verify.verdict import Verdict, Verifier


def verify(response: str, truth: str) -> Verdict:
    """Whether the last number of `response` is the last number of `truth`."""
    expected = last_number(truth)
    if expected is None:
        raise ValueError(_no_number(truth))
    found = last_number(response)
    if found is None:
        return Verdict(False, "no number in the response")
    return Verdict(same_number(found, expected), f"last number is {_short(found)}")


def check(truth: Any) -> None:
    """Raises ValueError unless `truth` is text with a number in it."""
    if not isinstance(truth, str) or last_number(truth) is None:
        raise ValueError(_no_number(truth))


def _no_number(truth: Any) -> str:
    return f"truth={shown(truth)} must be a string with a number in it, such as '72' or '1,000'"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"


GSM8K = Verifier("gsm8k", verify, check, judge=verify, inline=True)
