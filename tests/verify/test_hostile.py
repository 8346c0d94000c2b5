"""Hostile texts and truths: verifiers (but `code`) take linear time on the caller's thread, and `check` raises nothing but ValueError."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from engine.verify import Unjudged, Verdict, verifier
from engine.verify.ifeval.instructions import INSTRUCTIONS
from engine.verify.pool import Case, Pool

UNITS = {
    **{"blank": " ", "dollar": "$", "backslash": "\\", "open": "{", "close": "}", "paren": "(", "dot": ".", "digit": "7"},
    **{
        "newline": "\n",
        "tab": "\t",
        "quote": '"',
        "apostrophe": "'",
        "star": "*",
        "star line": "*\n",
        "dash": "–",
        "minus": "-",
        "slash": "/",
    },
    **{
        "box": r"\boxed{",
        "empty box": r"\boxed{}",
        "bare box": r"\boxed ",
        "bare box 1": r"\boxed 1{",
        "text": r"\text{",
        "space": r"\hspace{",
    },
    **{
        "pair": r"\(",
        "pairs": r"\(\)",
        "dollars": "$1$",
        "statement": "final answer is ",
        "statement 1": "the final answer is 1. ",
        "colon": "Answer: ",
    },
    **{
        "hope": "I hope it is correct ",
        "frac": r"\frac{1}{",
        "thin": r"1\,000",
        "comma": "1,",
        "thousands": ",000",
        "decimals": "1.",
        "exponent": "1e9 ",
    },
    **{
        "fraction": "1/",
        "zero": ".0",
        "letter": "a",
        "word": "the ",
        "keyword": "so",
        "capital": "A'",
        "contraction": "I'LL ",
        "sentence": "a. ",
    },
    **{
        "marks": "?!",
        "abbreviation": "e.g. ",
        "fence": "```\n",
        "title": "<<",
        "placeholder": "[",
        "section": "Section 1",
        "divider": "******",
    },
    **{
        "postscript": "p. ",
        "accent": "é",
        "combining": "e\u0301",
        "emoji": "🙂",
        "arabic": "٣",
        "wide": "１",
        "zero width": "\u200b",
        "null": "\x00",
    },
    **{"surrogate": "\ud800", "nbsp": "\u00a0", "alternation": "a|", "html": "<a ", "mail": "a@", "url": "http://"},
}
RULES = {
    "instruction_id_list": ["punctuation:no_comma", "keywords:existence", "change_case:capital_word_frequency", "detectable_format:title"],
    "kwargs": [{}, {"keywords": ["so", "C++"]}, {"capital_frequency": 2, "capital_relation": "at least"}, {}],
}
TRUTHS: dict[str, Any] = {
    "contains": ["Paris", "the city of Paris"],
    "exact": "yes",
    "gsm8k": "1,000",
    "ifeval": RULES,
    "ifeval_loose": RULES,
    "math": "\\frac{1}{2}",
    "regex": "x(a+)+y",
}
SMALL, LARGE, MEGABYTE = 30_000, 300_000, 1_000_000


def hostile(unit: str, size: int) -> list[str]:
    """`unit` repeated, alone and in the places that verifiers look at."""
    text = unit * (size // len(unit))
    return [text, f"The final answer is {text} x", rf"\boxed{{{text}", rf"\boxed{{{text}}}", f"$1${text}$", f"1{text} 2"]


def cpu_s(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_work_on_the_callers_thread_grows_linearly(unit: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the text: quadratic work would be a hundred times as much."""
    for module in ("math", "regex", "ifeval"):
        monkeypatch.setattr(f"engine.verify.{module}.alone", lambda *_: Verdict(False, "in a worker"))
    verify, truth = verifier(name).verify, TRUTHS[name]
    for short, long in zip(hostile(unit, SMALL), hostile(unit, LARGE), strict=True):
        small = min(cpu_s(lambda text=short: verify(text, truth)) for _ in range(2))
        assert cpu_s(lambda text=long: verify(text, truth)) < 0.5 + 40 * small


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_a_megabyte_is_judged_by_every_verifier(unit: str, workers: Pool) -> None:
    cases = [Case(verifier(name), text, truth) for name, truth in TRUTHS.items() for text in hostile(unit, MEGABYTE)[:2]]
    answers = workers.verify(cases)
    assert {type(answer) for answer in answers} == {Verdict}


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
def test_no_truth_makes_a_check_fail_without_its_field(unit: str) -> None:
    text = hostile(unit, MEGABYTE)[0]
    for name in TRUTHS:
        for truth in (text, [text], {"instruction_id_list": [text], "kwargs": [{}]}, {text: text}):
            complaint = refusal(name, truth)
            assert complaint.startswith("truth") or not complaint
            assert len(complaint) < 1500


def refusal(name: str, truth: Any) -> str:
    try:
        verifier(name).check(truth)
    except ValueError as error:
        return str(error)
    return ""


@cache
def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "truth", [nested(100_000), {"a": nested(100_000)}, 10**5000, [10**5000], float("nan"), None, True, {}, [{}], [[]]], ids=type
)
@pytest.mark.parametrize("name", TRUTHS)
def test_any_json_value_is_refused_in_one_line(name: str, truth: object) -> None:
    for value in (truth, {"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": truth}]}):
        with pytest.raises(ValueError, match=r"^truth") as caught:
            verifier(name).check(value)
        assert "\n" not in str(caught.value)


def test_every_argument_of_ifeval_may_be_long() -> None:
    """Arguments of a megabyte are judged in a worker."""
    for name, argument in (("keywords:existence", "keywords"), ("keywords:forbidden_words", "forbidden_words")):
        truth = {"instruction_id_list": [name], "kwargs": [{argument: ["a" * MEGABYTE, "so"]}]}
        verifier("ifeval").check(truth)
        assert isinstance(verifier("ifeval").verify("so" * 1000, truth), Verdict)
    assert len(INSTRUCTIONS) == 25


def test_slow_patterns_are_refused_and_never_unjudged(workers: Pool) -> None:
    cases = [Case(verifier("regex"), "a" * size, pattern) for size in (1000, MEGABYTE) for pattern in ("(a|aa)+$b", "(?:a*)*b", "(a+)+$b")]
    assert not any(isinstance(answer, Unjudged) or answer.correct for answer in workers.verify(cases))


@pytest.fixture(scope="module")
def workers() -> Any:
    with Pool(1, max_dropped=0) as pool:
        yield pool
