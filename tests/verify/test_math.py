r"""The math verifier: extraction of the final answer, equivalence, and expressions that do not terminate."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.verify.math import LIMIT_S, LONGEST, MATH, check, final_answer, judge, normal_form, verify
from engine.verify.pool import Case, Pool
from tests.support.paths import SHARED

MATH_TEST = SHARED / "math.jsonl"
SAMPLED = 300

# Exact at any magnitude, where math-verify drops differences below 1e-15.
SMALL_RIGHT = [
    ("2^{-60}", r"\frac{1}{1152921504606846976}"),
    (r"\sqrt{12}\cdot 10^{-20}", r"2\sqrt{3}\cdot 10^{-20}"),
    (r"10^{-40}(\sqrt{3}+1)^2", r"10^{-40}(4+2\sqrt{3})"),
    ("e^{-50}", r"\frac{1}{e^{50}}"),
    (r"\frac{x}{2^{60}}", "2^{-60}x"),
    (r"(2^{-60}, 1)", r"(\frac{1}{2^{60}}, 1)"),
    (r"2^{-1000}", r"(\frac{1}{2})^{1000}"),
    (r"1.5\times 10^{-20}", r"15\times 10^{-21}"),
    (r"1.5\times 10^{-8}", "0.000000015"),
    (r"0.1\cdot 10^{-9}\pi", r"10^{-10}\pi"),
    ("0.0000333333", r"\frac{1}{30000}"),
    ("0.001235", r"\frac{1}{810}"),
]
SMALL_WRONG = [
    ("2^{-60}", "2^{-61}"),
    ("2^{-60}", "-2^{-60}"),
    ("2^{-1000}", "2^{-1001}"),
    ("2^{-100000}", "-2^{-100000}"),
    ("0", "2^{-60}"),
    ("2^{-60}x", "2^{-61}x"),
    ("x^2+2^{-60}", "x^2"),
    ("x=2^{-60}", "x=2^{-61}"),
    ("x<2^{-60}", "x<2^{-61}"),
    ("(2^{-60},1)", "(2^{-61},1)"),
    ("[0,2^{-60}]", "[0,2^{-61}]"),
    (r"\{2^{-60},3\}", r"\{2^{-61},3\}"),
    (r"\begin{pmatrix}2^{-60}\\1\end{pmatrix}", r"\begin{pmatrix}2^{-61}\\1\end{pmatrix}"),
    ("1+2^{-60}i", "1-2^{-60}i"),
    ("e^{-50}", "e^{-60}"),
    (r"\frac{1}{50!}", r"\frac{1}{51!}"),
    (r"\sqrt{2}\cdot 10^{-20}", r"\sqrt{3}\cdot 10^{-20}"),
    (r"\sqrt{2}+10^{-20}", r"\sqrt{2}"),
    (r"1+\frac{1855077841}{1311738121}", r"1+\sqrt{2}"),
    (r"1.5\cdot 10^{-20}", r"2.5\cdot 10^{-20}"),
    (r"1.5\cdot 10^{-8}", r"2.5\cdot 10^{-8}"),
    (r"1.5\cdot 10^{-8}", r"\frac{25}{10^9}"),
    ("0.0000001", "2^{-25}"),
    ("10^{20}+10^{-20}", "10^{20}"),
    ("10^{30}+1", "10^{30}"),
]

RIGHT = [
    # numbers
    ("72", "72"),
    ("072", "72"),
    ("2.0", "2"),
    (".5", "0.5"),
    ("0.50", "0.5"),
    ("-5", "-5"),
    ("−5", "-5"),
    ("1,000", "1000"),
    ("1000", "1,000"),
    ("1{,}000", "1000"),
    (r"11,\! 111,\! 111", "11111111"),
    ("10^5", "100000"),
    ("5!", "120"),
    (r"7,\!512", "7512"),
    (r"7\,512", "7512"),
    (r"111, \! 111, \! 111", "111111111"),
    ("10,000, 20,000", "20000, 10000"),
    ("7, 512", "512, 7"),
    ("7, 512", r"\{7,512\}"),
    ("(1,234)", "(1, 234)"),
    ("x=1,000", "1000"),
    # dashes
    ("–8", "-8"),
    ("‐8", "-8"),
    ("‑8", "-8"),
    ("‒8", "-8"),
    ("﹣8", "-8"),
    ("－8", "-8"),
    (r"\frac{–1}{2}", r"-\frac{1}{2}"),
    ("(–8, 1)", "(-8, 1)"),
    ("10^{–2}", "0.01"),
    # small numbers
    *SMALL_RIGHT,
    # fractions
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"\frac12", r"\tfrac{1}{2}"),
    ("1/2", r"\frac{1}{2}"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{-1}{2}", r"\frac{1}{-2}"),
    (r"3\frac{1}{2}", r"\frac{7}{2}"),
    ("0.333333", r"\frac13"),  # to six digits, as math-verify has it
    # units, degrees, percent, currency
    (r"5 \text{ cm}", "5"),
    (r"(1.0, \frac{4}{2})", "(1,2)"),
    ("5", r"5\text{ inches}"),
    (r"5\text{ cm}^2", "5"),
    ("5 cm", "5"),
    ("12 square feet", "12"),
    ("5 dollars", r"\$5"),
    (r"\$18", "18"),
    (r"\$1,800", "1800"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"50\%", "50"),
    ("50%", r"50\%"),
    # what the answer is called
    ("x=5", "5"),
    ("5", "x = 5"),
    (r"x \in [1,2]", "[1,2]"),
    ("y=2x+1", "y = 1+2x"),
    # spelling
    (r"\left(1, 2\right)", "(1,2)"),
    (r"\left(1,\frac12\right)", "(1,0.5)"),
    (r"( 1 , 2 )", "(1,2)"),
    (r"(-\infty,2]", r"(-\infty, 2]"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"x\le 3", r"x \leq 3"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(E)}", "E"),
    (r"\textbf{E}", "E"),
    ("1,2", "1, 2"),
    ("1,2", "2,1"),  # without brackets, a set
    (r"\{1,2\}", r"\{2,1\}"),
    # algebra: what only the library can tell
    ("x+1", "1+x"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    ("3+4i", "4i+3"),
    (r"\log_2 8", "3"),
    (r"\binom{5}{2}", "10"),
    (r"2^{10}", "1024"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
]

WRONG = [
    ("", "72"),
    (" ", "72"),
    ("73", "72"),
    ("-72", "72"),
    ("72.5", "72"),
    ("0.333", r"\frac13"),
    ("3.14", r"\pi"),
    (r"\frac{1}{3}", r"\frac{1}{2}"),
    (r"\frac{2}{1}", r"\frac{1}{2}"),
    (r"-\frac12", r"\frac12"),
    (r"\frac{1}{0}", "5"),
    (r"\frac{0}{0}", "5"),
    ("10000", "1,000"),
    ("1,00", "100"),
    ("7, 512", "7512"),
    ("7, 512", "7,512"),
    ("1, 000", "1000"),
    (r"7,\,512", "7512"),
    (r"7,\ 512", "7512"),
    ("3, 141, 592", "3141592"),
    (r"45^\circ, 135^\circ", "45135"),
    ("–8", "8"),
    ("5–10", "-10"),
    *SMALL_WRONG,
    ("(1,2)", "(2,1)"),
    ("(1,2)", "(1,2,3)"),
    ("[1,2)", "(1,2)"),
    ("1,2", "1,2,3"),
    ("5, 6", "5"),
    ("5 or 6", "5"),
    ("x+1", "x+2"),
    ("x+1", "y+1"),
    ("2", "2x"),
    ("(1,2)", "(1,3)"),
    ("1,000", "(1,000)"),
    ("1.50001", "1.5"),
    ("x^2", "x^3"),
    (r"\sqrt{2}", "2"),
    ("3+4i", "3-4i"),
    (r"\text{(E)}", r"\text{(D)}"),
    ("Evelyn", "Carla"),
    (r"x < 3", r"x > 3"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\infty", r"-\infty"),
    ("The answer is five", "5"),
    ("((((", "5"),
    (r"\frac{", "5"),
    (r"\nonsense", "5"),
    ("~~", "5"),
    ("__import__('os')", "5"),
    ("5\x00", "5"),
    ("\ud800", "5"),
]


@pytest.mark.parametrize(("answer", "truth"), RIGHT)
def test_right(answer: str, truth: str) -> None:
    check(truth)
    assert judge(rf"so \boxed{{{answer}}}.", truth).correct
    assert judge(answer, rf"\boxed{{{truth}}}").correct


@pytest.mark.parametrize(("answer", "truth"), WRONG)
def test_wrong(answer: str, truth: str) -> None:
    assert not judge(rf"so \boxed{{{answer}}}.", truth).correct
    assert not judge(answer, truth).correct


def test_symbolic_checks_fire_on_any_thread() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(verify(r"\boxed{x+1}", "1+x")))
    thread.start()
    thread.join(60)
    assert [verdict.correct for verdict in found] == [True]


def test_an_expression_without_end_is_wrong_after_the_limit() -> None:
    started = time.monotonic()
    assert verify(r"\boxed{9^{9^{9^9}}}", "5").reason == "time limit of 5 s"
    assert time.monotonic() - started >= LIMIT_S


def test_an_expression_without_end_holds_up_no_other() -> None:
    hurried = replace(MATH, limit_s=2.0)
    with Pool(2, max_dropped=0) as pool:
        cases = [Case(hurried, rf"\boxed{{{answer}}}", "x+1") for answer in ["9^{9^{9^9}}", *["1+x"] * 50, "100!!!"]]
        answers = pool.verify(cases)
    assert [answer.correct for answer in answers if not isinstance(answer, Exception)] == [False, *[True] * 50, False]


MEGABYTES = [
    "a" * 10**6,
    "1" * 10**6,
    "$" * 10**6,
    "\\" * 10**6,
    "{" * 10**6,
    r"\boxed{" * 10**5,
    "final answer is " * 62_500,
    "\\(" * 500_000,
]


@pytest.mark.parametrize("text", MEGABYTES, ids=lambda text: text[:8])
def test_a_megabyte_is_judged_without_a_worker(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.verify.math.alone", None)
    assert not verify(text, "5").correct
    assert verify(rf"{text} \boxed{{5}}", "5").correct
    assert len(verify(text, "5").reason) < 200


def test_the_longest_answer_that_is_compared() -> None:
    assert judge("1" * LONGEST, "1" * LONGEST).correct
    assert judge("1" * (LONGEST + 1), "5").reason == f"the answer has {LONGEST + 1} characters, over the limit of {LONGEST}"


@pytest.mark.parametrize("truth", ["", " ", r"\boxed{}", "~", None, 5, "1" * (LONGEST + 1)])
def test_a_truth_without_an_answer_is_refused(truth: object) -> None:
    with pytest.raises(ValueError, match="must be a string with an answer of at most 1000 characters"):
        check(truth)


@cache
def problems() -> list[str]:
    if not MATH_TEST.exists():
        pytest.skip("the shared data is not here")
    return [json.loads(line)["solution"] for line in MATH_TEST.open()]


def test_every_solution_of_math_meets_its_own_answer() -> None:
    answers = [final_answer(solution) for solution in problems()]
    for answer in answers:
        check(answer)
    met = [judge(solution, answer).correct for solution, answer in zip(problems(), answers, strict=True)]
    assert sum(met) == len(met) == 4500


def test_normal_forms_keep_apart_what_math_verify_keeps_apart() -> None:
    from math_verify import parse
    from math_verify import verify as equal

    answers = sorted({final_answer(solution) for solution in problems()})
    start = random.Random(0).randrange(len(answers) - SAMPLED)
    for ours, theirs in zip(answers[start : start + SAMPLED], answers[start + 1 :], strict=False):
        if normal_form(ours) == normal_form(theirs) and ("%" in ours) == ("%" in theirs):  # 50% is 50 for MATH, 0.5 for the library
            one, other = (parse(rf"\boxed{{{answer}}}", parsing_timeout=0) for answer in (ours, theirs))
            assert equal(one, other, timeout_seconds=0), (ours, theirs)


WORDS = [*"0123456789xyi+-=<>,.()[]{}^_!%$ ", r"\frac", r"\sqrt", r"\text{", r"\boxed{", r"\pi", r"\left(", r"\{", "12", "{,}"]
LATEX = st.lists(st.sampled_from(WORDS), max_size=20).map("".join)


@given(LATEX, LATEX)
@settings(max_examples=30, deadline=None)
def test_no_answer_makes_it_raise_or_hang(pair: Pool, response: str, truth: str) -> None:
    try:
        check(truth)
    except ValueError:
        truth = "5"
    one, other = pair.verify([Case(MATH, response, truth), Case(MATH, truth, truth)])
    assert one == pair.verify([Case(MATH, response, truth)])[0]
    assert not isinstance(other, Exception)
    assert other.correct


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    with Pool(1, max_dropped=0) as pool:
        yield pool


def test_a_number_in_another_base_is_another_number() -> None:
    """math-verify drops the base. A response may leave it out, as questions name it."""
    for response in ("101_2", "101_{2}", "101_{ 2 }", r"101_{\text{2}}", "101"):
        assert judge(rf"\boxed{{{response}}}", "101_2").correct, response
    for response in ("101_3", "101_{10}", "101_{12}", "110_2", "5"):
        assert not judge(rf"\boxed{{{response}}}", "101_2").correct, response
    assert not judge(r"\boxed{\{12_5, 3\}}", r"\{12_7, 3\}").correct
    assert judge(r"\boxed{x_1^2}", "x^2_1").correct
