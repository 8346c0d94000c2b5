"""The verifier `gsm8k` and the evaluation's two metrics beside lm-eval's task `gsm8k_cot`: its filters and its exact match.

lm-eval's files are read from the installed package; nothing is downloaded. Each form of a response is filled in with several numbers, and
compared with a right and a wrong truth. DISAGREEMENTS are the responses that lm-eval reads differently, with the reason why.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine.evals.gsm8k import GSM8K
from engine.evals.suite import Item
from engine.verify import verifier

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install -e '.[peers]'")

NUMBERS = {
    "8": "9",
    "72": "71",
    "540": "54",
    "-3": "3",
    "1250": "250",
    "18000": "18",
    "1234567": "1234",
}  # the number of a response -> a wrong truth


class Verdicts(NamedTuple):
    """Whether a response is right by the last number, and by the number after "The answer is"."""

    flexible: bool
    strict: bool


# {n}: the number; {c}: with thousands separators.
FORMS = [
    "The answer is {n}.",
    "The answer is {c}.",
    "There are 3 + 4 = 7 of them. The answer is {n}.",
    "There are 15 trees, then 21 trees. So there must be {n}. The answer is {n}.",
    "The answer is {n}.\n\n",
    "The answer is {n}. ",
    "The answer is {n}.\n\nQ",
    "The answer is {n} apples.",
    "The answer is {n}, I think.",
    "So the answer is {n}.",
    "The answer is: {n}.",
    "The answer is ${n}.",
    "the total is {n}",
    "the total is {c}",
    "the total is ${c}.",
    "the total is {n}!",
    "the total is ({n})",
    "the total is **{n}**",
    "the total is \\boxed{{{n}}}",
    "the total is ${n}$",
    "the total is {n} dollars",
    "#### {n}",
    "#### {c}",
    "He has {n} left",
    "He has 5 apples and gives 2 away, so {n}",
    "2 + 2 = 4\n4 * 2 = 8\nIn total {n}",
    "= {n}",
    "={n}",
    "{n}",
    " {n} ",
    "{n}\n",
    "First 12. Then {n}",
    "Answer:{n}",
    "no number at all",
    "",
    "The answer is",
    "The answer is unknown.",
    "It costs ${c}, so the answer is {n}.",
    "The answer is {n}.\nThe answer is {n}.",
    "The answer is 1. No, the answer is {n}.",
    "{n} {n}",
    "x={n};",
    "{n}%",
]
BARE, STATED, NEITHER = Verdicts(True, False), Verdicts(True, True), Verdicts(False, False)  # right as a last number, or as a stated one
CUT = "the number ends the response; lm-eval's pattern for strict consumes one more character, here the last digit"
VALUE = "numbers are compared by value: 2.00 is 2, .5 is 0.5, 007 is 7; lm-eval compares text"
STOPS = "full stops around a number are not part of it; lm-eval's pattern takes them for one, and ignores one at the end"
DASH = "dashes of typography are minus signs; lm-eval reads the ASCII one only"
HYPHEN = "a minus after a word or a number is no sign; lm-eval reads it as one"
GROUPS = "spaces of typography and {,} separate thousands; lm-eval ends the number there"
COMMA = "a comma separates thousands only before three digits; lm-eval drops every comma, so that 12,34 is 1234"
EXPONENT = "1e3 is one number, a thousand; lm-eval reads 3"
FRACTION = "1/2 is one number; lm-eval reads 2"
SCRIPT = "digits of all scripts are read; lm-eval reads ASCII only"
# (response, truth, this project's verdicts, lm-eval's, why they differ)
DISAGREEMENTS = [
    ("The answer is 18", "18", STATED, BARE, CUT),
    ("The answer is 8", "8", STATED, BARE, CUT),
    ("the total is 2.00", "2", BARE, NEITHER, VALUE),
    ("It costs $1,250.00", "1250", BARE, NEITHER, VALUE),
    ("The answer is 2.00. ", "2", STATED, NEITHER, VALUE),
    ("The answer is .5.", "0.5", STATED, NEITHER, VALUE),
    ("= .5", "0.5", BARE, NEITHER, VALUE),
    ("18.50", "18.5", BARE, NEITHER, VALUE),
    ("007", "7", BARE, NEITHER, VALUE),
    ("18 ...", "18", BARE, NEITHER, STOPS),
    ("the total is 18..", "18", BARE, NEITHER, STOPS),
    ("The answer is 5..", "5", STATED, Verdicts(False, True), STOPS),
    ("It is \u221218", "-18", BARE, NEITHER, DASH),
    ("The answer is \u22125.", "-5", STATED, NEITHER, DASH),
    ("between 10-18", "18", BARE, NEITHER, HYPHEN),
    ("x-12", "12", BARE, NEITHER, HYPHEN),
    ("12\u00a0345", "12345", BARE, NEITHER, GROUPS),
    ("12{,}345", "12345", BARE, NEITHER, GROUPS),
    ("12,34", "1234", NEITHER, BARE, COMMA),
    ("The answer is 1,8.", "18", NEITHER, STATED, COMMA),
    ("It is 1e3", "1000", BARE, NEITHER, EXPONENT),
    ("so 1/2", "2", NEITHER, BARE, FRACTION),
    ("It is \uff11\uff18", "18", BARE, NEITHER, SCRIPT),
    ("\u0663", "3", BARE, NEITHER, SCRIPT),
]


def ours(response: str, truth: str) -> Verdicts:
    cases = GSM8K.cases(Item("", truth), response)
    found = GSM8K.scores([[verifier("gsm8k").verify(text, expected).correct for text, expected in cases]])
    return Verdicts(bool(found["flexible"][0]), bool(found["strict"][0]))


@cache
def task() -> dict[str, Any]:
    """lm-eval's gsm8k_cot."""
    import yaml

    return yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k-cot.yaml").read_text(encoding="utf-8"))


def theirs(response: str, truth: str) -> Verdicts:
    from lm_eval.api.metrics import exact_match_hf_evaluate  # type: ignore[import-not-found]
    from lm_eval.filters.extraction import RegexFilter  # type: ignore[import-not-found]

    metric = task()["metric_list"][0]
    options = {name: metric[name] for name in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    found = {}
    for each in task()["filter_list"]:
        pattern = {name: value for name, value in each["filter"][0].items() if name != "function"}
        answer = next(iter(RegexFilter(**pattern).apply([[response]], [{}])))[0]
        found[each["name"]] = bool(exact_match_hf_evaluate([answer], [truth], **options)["exact_match"])
    return Verdicts(found["flexible-extract"], found["strict-match"])


def filled(form: str, number: str) -> str:
    return form.format(n=number, c=f"{int(number):,}")


def test_verdicts_are_lm_evals() -> None:
    cases = [(filled(form, number), truth) for form in FORMS for number, wrong in NUMBERS.items() for truth in (number, wrong)]
    assert len({response for response, _ in cases}) >= 200
    compared = [(response, truth, ours(response, truth), theirs(response, truth)) for response, truth in cases]
    assert [case for case in compared if case[2] != case[3]] == []
    assert {case[2] for case in compared} == {BARE, STATED, NEITHER}


@pytest.mark.parametrize(("response", "truth", "found", "expected", "reason"), DISAGREEMENTS)
def test_disagreements(response: str, truth: str, found: Verdicts, expected: Verdicts, reason: str) -> None:
    assert (ours(response, truth), theirs(response, truth)) == (found, expected), reason
