r"""`math`: the final answer of a response equals the truth. For competition mathematics ("flex" in Tülu 3, section 6).

The final answer is the content of the last \boxed{}, else the text after the last "final answer is", else the last $…$, else the whole
response. Tülu 3's verifier accepts a match in any of these; here only the first one that exists counts, so that a response cannot offer
several answers.

Two answers are equal if their normal forms are (after Hendrycks et al., arXiv 2103.03874, and Lewkowycz et al., arXiv 2206.14858: units,
spacing, degrees, percent and dollar signs are ignored), or if the math-verify library finds them equal. The library may not terminate, so
it only runs in a worker with a time limit.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from typing import Any, NamedTuple

from math_verify import LatexExtractionConfig, parse
from math_verify import verify as equal_expressions
from sympy.core.random import seed

from engine.verify.pool import alone
from engine.verify.verdict import Verdict, Verifier

LONGEST = 1000  # characters of an answer; the longest of MATH has 81
LIMIT_S = 5.0
LATEX_ONLY = (LatexExtractionConfig(),)  # the library's expression parser passes text to eval

BRACES = re.compile(r"\\(?:boxed|fbox)\s*(?P<box>\{)|\\(?:boxed|fbox)\s+(?P<bare>[^\s{}$]+)|\\[{}]|(?P<brace>[{}])")
FINAL = re.compile(r"final answer is:?[ \t]*", re.IGNORECASE)
HOPE = re.compile(r"\.?\s*I hope it is correct.*", re.IGNORECASE)
DOLLAR = re.compile(r"(?<!\\)\$\$?|\\[()\[\]]")
PLAIN = {0xFEE0 + code: code for code in range(0x21, 0x7F)} | {ord("−"): "-", ord("⁄"): "/"}  # full-width characters


def verify(response: str, truth: str) -> Verdict:
    """Whether the final answer of `response` equals that of `truth`. Thread-safe. Uses a worker if normal forms do not decide."""
    return _by_normal_form(final_answer(response), final_answer(truth)) or alone(MATH, response, truth)


def judge(response: str, truth: str) -> Verdict:
    """`verify` in this process, without a time limit."""
    found, expected = final_answer(response), final_answer(truth)
    return _by_normal_form(found, expected) or _by_library(found, expected)


def check(truth: Any) -> None:
    """Raises ValueError unless `truth` is an answer, or text that ends in one."""
    if not isinstance(truth, str) or not (normal_form(final_answer(truth)) and len(final_answer(truth)) <= LONGEST):
        shown = truth if not isinstance(truth, str) else f"{truth[:40]}…" if len(truth) > 40 else truth
        raise ValueError(f"truth={shown!r} must be a string with an answer of at most {LONGEST} characters, such as '\\frac{{1}}{{2}}'")


def final_answer(text: str) -> str:
    """The final answer of `text` without surrounding markup; may be empty. Linear time."""
    answer = _last_boxed(text)
    if answer is None:
        answer = _after_final_answer_is(text)
    if answer is None:
        answer = _last_dollars(text)
    return _bare(text if answer is None else answer)


def _last_boxed(text: str) -> str | None:
    r"""The content of the closed \boxed{} that starts last; also of "\boxed 5" and \fbox{}."""
    open_boxes: list[int] = []  # for each open brace, where the content of its box starts, or -1
    best, inside = -1, None
    for mark in BRACES.finditer(text):
        if mark["bare"] is not None and mark.start() > best:
            best, inside = mark.start(), mark["bare"]
        elif mark["box"] is not None:
            open_boxes.append(mark.end())
        elif mark["brace"] == "{":
            open_boxes.append(-1)
        elif mark["brace"] == "}" and open_boxes and (start := open_boxes.pop()) > best:
            best, inside = start, text[start : mark.start()]
    return inside


def _after_final_answer_is(text: str) -> str | None:
    ends = [match.end() for match in FINAL.finditer(text)]
    if not ends:
        return None
    line = HOPE.sub("", text[ends[-1] :].split("\n", 1)[0])
    return _last_dollars(line) or line


def _last_dollars(text: str) -> str | None:
    marks = [(match.start(), match.end()) for match in DOLLAR.finditer(text)]
    return text[marks[-2][1] : marks[-1][0]] if len(marks) > 1 else None


def _bare(answer: str) -> str:
    answer = answer.translate(PLAIN).strip()
    while len(answer) > 1 and answer[0] == answer[-1] == "$":
        answer = answer[1:-1].strip()
    return answer.removesuffix(".").rstrip()


def _by_normal_form(found: str, expected: str) -> Verdict | None:
    """The verdict if the normal forms decide it, else None."""
    if not found:
        return Verdict(False, "no answer in the response")
    if len(found) > LONGEST:
        return Verdict(False, f"the answer has {len(found)} characters, over the limit of {LONGEST}")
    ours, theirs = normal_form(found), normal_form(expected)
    if ours == theirs:
        return Verdict(True, f"{_short(found)} equals the truth as written")
    a, b = _numbers(ours), _numbers(theirs)
    if a is None or b is None or a.brackets != b.brackets or ("%" in found) != ("%" in expected):
        return None
    if a == b:
        return Verdict(True, f"{_short(found)} equals the truth in numbers")
    exact = "." not in ours and "." not in theirs
    differ = len(a.values) != len(b.values) or any(abs(x - y) > abs(y) / 1000 for x, y in zip(a.values, b.values, strict=True))
    return Verdict(False, f"{_short(found)} does not equal the truth in numbers") if exact or differ else None


def _by_library(found: str, expected: str) -> Verdict:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns about the missing time limit and every failed parse
    seed(0)  # sympy tests for zero at random points
    try:
        ours, theirs = (parse(rf"\boxed{{{answer}}}", LATEX_ONLY, parsing_timeout=0) for answer in (found, expected))  # type: ignore[arg-type]
        same = equal_expressions(theirs, ours, timeout_seconds=0)
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
        (r"\{,\}", ","),
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
        (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac(\d)\{", r"\\frac{\1}{"),
        (r"\\frac\{([^{}]*)\}(\d)", r"\\frac{\1}{\2}"),
        (r"\\sqrt(\d|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
        (r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])(?=$|[.^a-zA-Z\\])", lambda match: match[1].replace(",", "")),
        (r"(?<![\d.])\.(\d)", r"0.\1"),
        (r"(\.\d*?)0+(?!\d)", r"\1"),
        (r"\.(?!\d)", ""),
        (r"^\(([a-zA-Z])\)$", r"\1"),
    )
]
RATIONAL = re.compile(r"([-+]?)(?:(\d+(?:\.\d+)?)|\\frac\{(-?\d+)\}\{(-?\d+)\})", re.ASCII)


def normal_form(answer: str) -> str:
    """Canonical spelling of `answer`. Equal forms mean equal answers; different forms may still be equal."""
    for pattern, replacement in REWRITES:
        answer = pattern.sub(replacement, answer)
    return answer


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
