"""The verifier `math` beside math-verify's own parse and verify, on the committed cases of math_cases.json.

An answer of a case is put into a box, "responses" are whole. Each has its verdict: that of a reader who knows what the competition asks.
Where the package finds another, THEIRS says why; where this project does, OURS.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from engine.verify.math import judge

math_verify = pytest.importorskip("math_verify", reason="math-verify is not installed; pip install -e '.[peers]'")

CASES = Path(__file__).with_name("math_cases.json")


class Case(NamedTuple):
    """A response, the truth, and whether the response is right."""

    response: str
    truth: str
    verdict: bool


def boxed(answer: str) -> str:
    return f"So we find \\boxed{{{answer}}}."


PUNCTUATION = "a full stop after the number is not part of it; the package extracts nothing from the box"
DEGREES = r"degrees are a unit, which is ignored in any spelling; the package knows \circ only"
BASES = "a number in base 3 is not the same digits in base 2; the package drops the subscript"
TINY = "differences below 1e-15 count; the package rounds them to 0"
WIDE = "full-width digits are digits; the package reads ASCII only"
TEXT = r"a text is the same inside and outside of \text{}; the package takes the number in it"
SEVERAL = "the last box is the answer; the package wants all of them to be"
BOXES = r"\fbox{} is a box; the package reads \boxed{} only, and here extracts nothing"
EMPTY = "an empty box does not hide the answer before it"
LATER = "a final answer after a box counts; the package prefers boxes"
WORDED = "an answer is stated by 'answer is' or 'answer:'; otherwise the whole text is compared. The package takes the last number"
# (truth, response) -> why the verdict of math-verify is not that of the case
THEIRS = {
    ("12", boxed("12.")): PUNCTUATION,
    ("5", boxed("5.")): PUNCTUATION,
    ("45^\\circ", boxed("45\\degree")): DEGREES,
    ("101_2", boxed("101_3")): BASES,
    ("2^{-60}", boxed("2^{-61}")): TINY,
    ("2^{-60}", boxed("-2^{-60}")): TINY,
    ("10^{-20}", boxed("10^{-21}")): TINY,
    ("10^{-20}", boxed("2 \\cdot 10^{-20}")): TINY,
    ("5", boxed("\uff15")): WIDE,
    ("\\text{June 20}", boxed("June 20")): TEXT,
    ("42", "\\boxed{41} is wrong, so \\boxed{42}"): SEVERAL,
    ("42", "\\fbox{42}"): BOXES,
    ("42", "\\boxed{42}\n\nNote: \\boxed{}"): EMPTY,
    ("42", "\\boxed{43}. Final answer: 42"): LATER,
}
OURS = {("42", "We have 3 cases, answer 42"): WORDED}  # the same for this project


def cases() -> list[Case]:
    found = []
    for group in json.loads(CASES.read_text(encoding="utf-8")):
        answers = {boxed(answer): name == "right" for name in ("right", "wrong") for answer in group.get(name, [])}
        found += [Case(response, group["truth"], verdict) for response, verdict in (answers | group.get("responses", {})).items()]
    return found


def theirs(case: Case) -> bool:
    return math_verify.verify(math_verify.parse(f"${case.truth}$"), math_verify.parse(case.response))


def test_enough_cases() -> None:
    verdicts = [case.verdict for case in cases()]
    assert len(verdicts) >= 300
    assert min(verdicts.count(True), verdicts.count(False)) >= 150
    assert len({(case.truth, case.response) for case in cases()}) == len(verdicts)


def test_verdicts_of_this_project() -> None:
    differ = {(case.truth, case.response) for case in cases() if judge(case.response, case.truth).correct != case.verdict}
    assert differ == set(OURS)


def test_verdicts_of_math_verify() -> None:
    """Every difference between the two is in one of the tables."""
    differ = {(case.truth, case.response) for case in cases() if theirs(case) != case.verdict}
    assert differ == set(THEIRS)
