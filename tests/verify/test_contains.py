"""The contains verifier: an answer occurs in the response, by whole words, ignoring case, punctuation and articles."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.verify import Verdict, verifier
from engine.verify.contains import plain

CONTAINS = verifier("contains")


@pytest.mark.parametrize(
    ("response", "truth", "correct"),
    [
        ("Paris", ["Paris"], True),
        ("It is in paris, France.", ["Paris"], True),
        ("The Beatles wrote it", ["Beatles"], True),
        ("Beatles", ["The Beatles"], True),
        ("the U.S. Senate", ["US Senate"], True),
        ("on 14\n December   1972", ["14 December 1972"], True),
        ("London or Rome", ["Paris", "Rome"], True),
        ("a woman", ["Oman"], False),
        ("comparison", ["Paris"], False),
        ("December 1972", ["14 December 1972"], False),
        ("New New York", ["New York"], True),
        ("", ["Paris"], False),
        ("the", ["Paris"], False),
        ("Zürich", ["zürich"], True),
        ("Jean\u2010Paul", ["Jean-Paul"], True),
        ("O’Brien", ["O'Brien"], True),
        ("it was –8 degrees", ["-8"], True),
    ],
)
def test_truth_table(response: str, truth: list[str], correct: bool) -> None:
    assert CONTAINS.verify(response, truth).correct is correct


@pytest.mark.parametrize("truth", ["Paris", [], [""], ["The"], ["Paris", "..."], [3], None])
def test_a_truth_that_stands_in_everything_is_refused(truth: Any) -> None:
    with pytest.raises(ValueError, match="must be a list of answers, none of them blank"):
        CONTAINS.check(truth)


@given(st.text(), st.text(), st.text(min_size=1))
def test_an_answer_between_others_words_is_found(before: str, after: str, answer: str) -> None:
    assume(plain(answer))
    found = CONTAINS.verify(f"{before} {answer} {after}", [answer])
    assert isinstance(found, Verdict)
    assert found.correct
