"""`gsm8k`: the last number of the response equals the last number of the truth (Tülu 3, section 6; arXiv 2411.15124).

Numbers are compared exactly, without arithmetic: 1,000 equals 1000.0 and 1e3; 0.333 does not equal 1/3. Differences from Tülu 3's
verifier: commas are removed from both sides (otherwise a truth such as 1,000 never matches), a minus between two numbers is not a sign
("12-5" ends in 5), and digits of all scripts are accepted.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal
from typing import Any

from engine.verify.verdict import Verdict, Verifier

LAST_DIGIT = re.compile(r"\d\D*\Z")
NUMBER = re.compile(
    r"""(?:(?<![\w.,)\]}%])(?P<sign>[-+])(?:\\?[$€£¥₹])?)?          # a sign, maybe before a currency
        (?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?       # 1,000.50
                   |(?<![\w.])\.\d+)                                # .5, but not the 5 of No.5
        (?P<exponent>[eE][-+]?\d{1,9}(?!\w))?
        (?P<over>/\d+)?                                             # 1/2 is not 2""",
    re.VERBOSE,
)
PLAIN = str.maketrans({"−": "-", "﹣": "-", "－": "-", "，": ",", "．": ".", "＄": "$", "／": "/"})


def verify(response: str, truth: str) -> Verdict:
    """Whether the last number of `response` is the last number of `truth`."""
    expected = last_number(truth)
    if expected is None:
        raise ValueError(_no_number(truth))
    found = last_number(response)
    if found is None:
        return Verdict(False, "no number in the response")
    return Verdict(_same(found, expected), f"last number is {_short(found)}")


def check(truth: Any) -> None:
    """Raises ValueError unless `truth` is text with a number in it."""
    if not isinstance(truth, str) or last_number(truth) is None:
        raise ValueError(_no_number(truth))


def last_number(text: str) -> str | None:
    """The last number in `text`, without commas and currency, as Decimal accepts it or as "1/2"; None if there is none. Linear time."""
    end = LAST_DIGIT.search(text)
    if end is None:
        return None
    word = text[: end.start() + 1].replace("{,}", ",").rsplit(None, 1)[-1]  # a numeral has no white space in it
    last = deque(NUMBER.finditer(word if word.isascii() else word.translate(PLAIN)), maxlen=1)[0]
    sign = "-" if last["sign"] == "-" else ""
    return f"{sign}{last['digits'].replace(',', '')}{last['exponent'] or ''}{last['over'] or ''}"


def _same(a: str, b: str) -> bool:
    if a == b or "/" in a or "/" in b:
        return a == b
    return Decimal(a) == Decimal(b)


def _no_number(truth: Any) -> str:
    return f"truth={_short(str(truth))!r} must be a string with a number in it, such as '72' or '1,000'"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"


GSM8K = Verifier("gsm8k", verify, check, judge=verify, inline=True)
