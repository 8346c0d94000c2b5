r"""`math`: the final answer of a response equals the truth. For competition mathematics ("flex" in Tülu 3, section 6).

Two final answers are equal if their normal forms are (after Hendrycks et al., arXiv 2103.03874, and Lewkowycz et al., arXiv 2206.14858:
units, spacing, degrees, percent and dollar signs are ignored), or if the math-verify library finds them equal. The library may not
terminate, so it only runs in a worker with a time limit.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, NamedTuple

from engine.verify.expressions import equal
from engine.verify.final_answer import final_answer
from engine.verify.numbers import comma_separators
from engine.verify.pool import alone
from engine.verify.shown import shown
from engine.verify.verdict import Verdict, Verifier

LONGEST = 1000  # characters of an answer; the longest of MATH has 81
LIMIT_S = 5.0


def verify(response: str, truth: str) -> Verdict:
    """Whether the final answer of `response` equals that of `truth`. Thread-safe. Uses a worker if normal forms do not decide."""
    return _by_normal_form(final_answer(response), _expected(truth)) or alone(MATH, response, truth)


def judge(response: str, truth: str) -> Verdict:
    """`verify` in this process, without a time limit."""
    found, expected = final_answer(response), _expected(truth)
    return _by_normal_form(found, expected) or _by_library(found, expected)


def check(truth: Any) -> None:
    """Raises ValueError unless `truth` is an answer, or text that ends in one."""
    if not normal_form(_expected(truth)):
        raise ValueError(_no_answer(truth))


def _expected(truth: Any) -> str:
    answer = final_answer(truth) if isinstance(truth, str) else ""
    if not 0 < len(answer) <= LONGEST:
        raise ValueError(_no_answer(truth))
    return answer


def _no_answer(truth: Any) -> str:
    return f"truth={shown(truth)} must be a string with an answer of at most {LONGEST} characters, such as '\\frac{{1}}{{2}}'"


def _by_normal_form(found: str, expected: str) -> Verdict | None:
    """The verdict if the normal forms decide it, else None."""
    if not found:
        return Verdict(False, "no answer in the response")
    if len(found) > LONGEST:
        return Verdict(False, f"the answer has {len(found)} characters, over the limit of {LONGEST}")
    ours, theirs = normal_form(found), normal_form(expected)
    if ours == theirs:
        return Verdict(True, f"{_short(found)} equals the truth as written")
    bases = sorted(BASE.findall(ours)), sorted(BASE.findall(theirs))
    if all(bases) and bases[0] != bases[1]:
        return Verdict(False, f"{_short(found)} is not in the base of the truth")
    a, b = _numbers(ours), _numbers(theirs)
    if a is None or b is None or a.brackets != b.brackets or ("%" in found) != ("%" in expected):
        return None
    if a == b:
        return Verdict(True, f"{_short(found)} equals the truth in numbers")
    exact = "." not in ours and "." not in theirs
    differ = len(a.values) != len(b.values) or any(abs(x - y) > abs(y) / 1000 for x, y in zip(a.values, b.values, strict=True))
    return Verdict(False, f"{_short(found)} does not equal the truth in numbers") if exact or differ else None


def _by_library(found: str, expected: str) -> Verdict:
    try:
        same = equal(_join_thousands(found), _join_thousands(expected))
    except Exception as error:
        return Verdict(False, f"{_short(found)} cannot be compared: {type(error).__name__}")
    return Verdict(same, f"{_short(found)} {'equals' if same else 'does not equal'} the truth")


# One-letter units are left to the library: 3m may mean 3 times m.
UNITS = "units?|dollars?|cents?|degrees?|inch(?:es)?|feet|foot|miles?|[ckm]m|meters?|mph|pounds?|grams?|kg|hours?|minutes?|seconds?|days?"
REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|displaystyle|bigl?|bigr?|Bigl?|Bigr?)(?![a-zA-Z])", ""),
        (r"\\[!,;: ]|\\q?quad(?![a-zA-Z])|~", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree(?![a-zA-Z])|°|\\?%|\\?\$", ""),
        (r"(?<=[\w)}\]])\s*\\(?:text|mbox|textrm|mathrm|textnormal)\s*\{[^{}]*\}(?:\^\{?[23]\}?)?\.?$", ""),  # a unit
        (r"\\(?:text|mbox|textrm|mathrm|textnormal|textbf|textit|mathbf)\s*\{([^{}]*)\}", r"\1"),
        (rf"(?<=[\w)}}\]])\s*(?:square |cubic |sq\.? )?(?:{UNITS})\.?(?:\^\{{?[23]\}}?)?$", ""),
        (r"\\le(?![a-zA-Z])", r"\\leq"),
        (r"\\ge(?![a-zA-Z])", r"\\geq"),
        (r"\\ne(?![a-zA-Z])", r"\\neq"),
        (r"^\s*\\?[a-zA-Z]\s*(?:=|\\in(?![a-zA-Z]))\s*(?=[^=]+$)", ""),
        (r"\s+", ""),
        (r"(?<=\d)_\{(\d+)\}(?!\w)", r"_\1"),  # a base
        (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac(\d)\{", r"\\frac{\1}{"),
        (r"\\frac\{([^{}]*)\}(\d)", r"\\frac{\1}{\2}"),
        (r"\\sqrt(\d|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
        (r"(?<![\d.])\.(\d)", r"0.\1"),
        (r"(\.\d*?)0+(?!\d)", r"\1"),
        (r"\.(?!\d)", ""),
        (r"^\(([a-zA-Z])\)$", r"\1"),
    )
]
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
RATIONAL = re.compile(r"([-+]?)(?:(\d+(?:\.\d+)?)|\\frac\{(-?\d+)\}\{(-?\d+)\})", re.ASCII)
BASE = re.compile(r"(?<=\d)_\{?(\d+)", re.ASCII)  # of 101_2; the library drops it


def normal_form(answer: str) -> str:
    """Canonical spelling of `answer`. Equal forms mean equal answers; different forms may still be equal."""
    answer = _join_thousands(answer)
    for pattern, replacement in REWRITES:
        answer = pattern.sub(replacement, answer)
    return answer


def _join_thousands(answer: str) -> str:
    r"""1,000 · 1{,}000 · 1,\!000 as 1000. Not "7, 512", which is two numbers; nor (1,234), where a comma separates coordinates."""
    answer = comma_separators(answer)
    return THOUSANDS.sub(lambda match: match[0] if _inside_brackets(answer[: match.start()]) else match[0].replace(",", ""), answer)


def _inside_brackets(before: str) -> bool:
    opened, closed = (sum(map(before.count, marks)) for marks in (("(", "[", r"\{"), (")", "]", r"\}")))
    return opened > closed


class Numbers(NamedTuple):
    """A number, or a point or an interval of numbers."""

    brackets: str
    values: list[Fraction]


def _numbers(form: str) -> Numbers | None:
    brackets = form[0] + form[-1] if form[:1] in ("(", "[") and form[-1:] in (")", "]") else ""
    values = [_rational(part) for part in (form[1:-1].split(",") if brackets else [form])]
    known = [value for value in values if value is not None]
    return Numbers(brackets, known) if len(known) == len(values) else None


def _rational(form: str) -> Fraction | None:
    match = RATIONAL.fullmatch(form)
    if match is None:
        return None
    sign, number, over, under = match.groups()
    if number is None and int(under) == 0:
        return None
    value = Fraction(number) if number is not None else Fraction(int(over), int(under))
    return -value if sign == "-" else value


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:60]}…"


MATH = Verifier("math", verify, check, judge=judge, limit_s=LIMIT_S)
