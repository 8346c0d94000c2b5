"""The SVAMP data: worked answers end in the right answer, and the files share no problem."""

from __future__ import annotations

from fractions import Fraction

import pytest

from benchmarks.data import svamp
from engine.data.rows import Source, read_rows
from engine.verify import verifier
from tests.support.paths import SHARED

SVAMP = SHARED / "svamp.jsonl"


def test_worked_answers() -> None:
    assert svamp.worked("( 78.0 * ( 186.0 - 172.0 ) )") == (Fraction(1092), ["186 - 172 = 14", "78 * 14 = 1092"])
    assert svamp.worked("( 3.0 / 2.0 )") == (Fraction(3, 2), ["3 / 2 = 1.5"])
    assert svamp.worked("( 4700.0 * 4700.0 )")[1] == ["4700 * 4700 = 22090000"]


def test_a_problem_with_a_wrong_answer_is_dropped() -> None:
    row = {"Body": "Ann has 4 eggs", "Question": "How many?", "Equation": "( 4.0 - 2.0 )"}
    assert not any(svamp.parts([row | {"Answer": 3.0}]).values())
    (results,) = (rows for rows in svamp.parts([row | {"Answer": 2.0}]).values() if rows)
    assert results[0]["prompt"] == "Ann has 4 eggs, How many?"


@pytest.mark.skipif(not SVAMP.exists(), reason="needs shared/data")
def test_no_problem_is_in_two_files() -> None:
    results = svamp.parts(row for _, row in read_rows(Source(str(SVAMP))))
    assert sum(map(len, results.values())) == 799, "one of the 800 has an equation that does not give its answer"
    assert len({row["prompt"] for rows in results.values() for row in rows}) == 799
    assert len(results["held_out"]) >= 150
    judged_by = verifier("gsm8k")
    for row in results["tasks"] + results["held_out"]:
        assert judged_by.verify(row["truth"], row["truth"]).correct
