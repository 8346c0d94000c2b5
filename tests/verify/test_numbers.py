"""Numbers in text: signs, separators, scripts and currency."""

from __future__ import annotations

import pytest

from engine.verify import verifier
from engine.verify.numbers import last_number, same_number

DASHES = "-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"


@pytest.mark.parametrize("dash", DASHES, ids=lambda dash: f"U+{ord(dash):04X}")
@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("~8", "-8"), ("it is ~8.", "-8"), ("x = ~8", "-8"), ("(~8)", "-8"), ("“~8”", "-8"), ("'~8'", "-8"), ("**~8**", "-8")),
        *(
            ("$~8", "-8"),
            ("~$8", "-8"),
            ("answer:~8", "-8"),
            ("~1,000.50%", "-1000.50"),
            ("~.5", "-.5"),
            ("~8/3", "-8/3"),
            ("1e~3", "1e-3"),
        ),
        *(("5~10", "10"), ("$5~$10", "10"), ("5%~10%", "10"), ("5€~10€", "10"), ("5°~10°", "10"), ("5'~10'", "10"), ("(3)~4", "4")),
        *(("pages 5~10.", "10"), ("x~8", "8"), ("8~", "8"), ("5 ~ 10", "10"), ("3 ~ ~8", "-8"), ("3~~8", "-8"), ("2024~11~05", "05")),
    ],
)
def test_every_dash_is_a_minus_sign_but_not_between_numbers(text: str, number: str, dash: str) -> None:
    assert last_number(text.replace("~", dash)) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,000", "1000"),
        ("1{,}000", "1000"),
        (r"1\,000", "1000"),
        (r"12,\!345,\!678", "12345678"),
        (r"111, \! 111, \! 111", "111111111"),
        ("10\u202f000", "10000"),
        ("10\u2009000", "10000"),
        ("10\u00a0000", "10000"),
        ("10\u00a000", "00"),
        ("10 000", "000"),
        ("7, 512", "512"),
        ("1,00", "00"),
        ("１，０００．５", "1000.5"),
        ("—8", "8"),  # an em dash is no sign
        ("₹1,200", "1200"),
        ("1.5E2", "1.5E2"),
        ("10^3", "3"),
        ("no", None),
        ("", None),
    ],
)
def test_separators_and_scripts(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_numbers_are_compared_exactly() -> None:
    assert same_number("1e3", "1000.0")
    assert same_number("٣٤", "34")
    assert not same_number("1e-30", "2e-30")
    assert not same_number("1/2", "0.5")


@pytest.mark.parametrize("dash", DASHES)
def test_verifiers_and_evaluations_read_the_same_signs(dash: str) -> None:
    from engine.evals.gsm8k import strict_answer
    from engine.verify.contains import plain

    assert verifier("gsm8k").verify(f"it is {dash}8", "-8").correct
    assert verifier("math").verify(rf"\boxed{{{dash}8}}", "-8").correct
    assert not verifier("math").verify(rf"\boxed{{{dash}8}}", "8").correct
    assert strict_answer(f"The answer is {dash}8.") == "-8."
    assert plain(f"Jean{dash}Paul") == plain("Jean-Paul")
