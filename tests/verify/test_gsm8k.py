"""The gsm8k verifier: a truth table, the data set's own solutions, and linear time."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.verify.gsm8k import check, last_number, verify
from tests.support.paths import SHARED

RIGHT = [
    ("72", "72"),
    ("The answer is 72.", "72"),
    ("The answer is 72", "72."),
    ("#### 72", "72"),
    ("48/2 = <<48/2=24>>24\n#### 72", "72"),
    ("12 + 60 = 72", "72"),
    ("So it is 72!!!", "72"),
    ("**72**", "72"),
    ("$\\boxed{72}$", "72"),
    ("(72)", "72"),
    ("[72]", "72"),
    ("72 clips", "72"),
    ("072", "72"),
    ("+72", "72"),
    # commas, on either side
    ("1,000", "1000"),
    ("1000", "1,000"),
    ("1,000", "1,000"),
    ("It made 1,234,567 dollars.", "1234567"),
    ("12,345.50", "12345.5"),
    ("\\boxed{1{,}000}", "1000"),
    ("He has 10,20", "20"),
    ("they are 1,2,3", "3"),
    ("5, 6, 7,", "7"),
    # currency and units
    ("$18", "18"),
    ("$18.00", "18"),
    ("18", "$18"),
    ("\\$18", "18"),
    ("€1,200", "1200"),
    ("£5.", "5"),
    ("$2.50", "2.5"),
    ("18 USD", "18"),
    ("50%", "50"),
    ("5km", "5"),
    # decimals and exponents
    ("3.0", "3"),
    ("3.", "3"),
    (".5", "0.5"),
    ("0.50", ".5"),
    ("1e3", "1000"),
    ("1.5E2", "150"),
    ("2e-1", "0.2"),
    ("No.5", "5"),
    # signs
    ("-5", "-5"),
    ("it is -5.", "-5"),
    ("−5", "-5"),
    ("-$5", "-5"),
    ("=-5", "-5"),
    ("{-5}", "-5"),
    ("12-5", "5"),
    ("between 3-4", "4"),
    ("2024-11-05", "5"),
    ("(3)-4", "4"),
    ("0", "-0"),
    # other scripts and odd spaces
    ("１８", "18"),
    ("１，０００", "1000"),
    ("答えは１８。", "18"),
    ("١٨", "18"),
    ("18\u00a0", "18"),
    ("18\u200b", "18"),
    ("18\x00", "18"),
    ("18\ud800", "18"),
    # fractions are compared as they are written
    ("1/2", "1/2"),
]

WRONG = [
    ("", "72"),
    ("   \n", "72"),
    ("seventy-two", "72"),
    ("no number at all", "0"),
    ("73", "72"),
    ("72 or 73", "72"),
    ("72.5", "72"),
    ("72.0001", "72"),
    ("-72", "72"),
    ("172", "72"),
    ("720", "72"),
    ("7 2", "72"),
    ("72, and there were 3 of them", "72"),
    ("72. Let me know if you have 2 questions", "72"),
    ("1,00", "100"),
    ("1,0000", "10000"),
    ("1 000", "1000"),
    ("1/2", "2"),
    ("3/4", "0.75"),
    ("0.333", "1/3"),
    ("0.3333333333333333", "0.333333333333333"),
    ("1e3", "3"),
    ("3-5", "-5"),
    ("$", "72"),
    ("½", "2"),
    ("x²", "2"),
    ("99999999999999999999999", "99999999999999999999998"),
    ("\ud800", "1"),
]


@pytest.mark.parametrize(("response", "truth"), RIGHT)
def test_right(response: str, truth: str) -> None:
    assert verify(response, truth).correct


@pytest.mark.parametrize(("response", "truth"), WRONG)
def test_wrong(response: str, truth: str) -> None:
    assert not verify(response, truth).correct


@pytest.mark.parametrize(
    "response",
    ["a" * 10**6, "7" * 10**6, "1,111" * 200_000, "1 " * 500_000, "-" * 10**6, "1e999999999", "1" + ",000" * 250_000 + "0", "5/" * 500_000],
    ids=lambda text: f"{len(text)}:{text[:8]}",
)
def test_a_megabyte_is_judged_and_wrong(response: str) -> None:
    assert not verify(response, "72").correct
    assert verify(f"{response} 72", "72").correct
    assert len(verify(response, "72").reason) < 100


def test_a_reason_says_what_was_read() -> None:
    assert verify("so 1,234", "5").reason == "last number is 1234"
    assert verify("so", "5").reason == "no number in the response"


@pytest.mark.parametrize("truth", ["", "none", None, 18, ["18"]])
def test_a_truth_without_a_number_is_refused(truth: object) -> None:
    with pytest.raises(ValueError, match="must be a string with a number in it"):
        check(truth)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_solution_of_gsm8k_meets_its_own_answer(split: str) -> None:
    path = SHARED / f"gsm8k_{split}.jsonl"
    if not path.exists():
        pytest.skip("the shared data is not here")
    answers = [json.loads(line)["answer"] for line in path.open()]
    labels = [answer.split("####")[1].strip() for answer in answers]
    assert any("," in label for label in labels)
    for answer, label in zip(answers, labels, strict=True):
        check(label)
        assert verify(answer, label).correct, answer


def test_graded_solutions_of_models_are_judged_as_their_graders_did() -> None:
    path = SHARED / "gsm8k_model_solutions.jsonl"
    if not path.exists():
        pytest.skip("the shared data is not here")
    for row in map(json.loads, path.open()):
        for graded in (value for value in row.values() if isinstance(value, dict)):
            assert verify(graded["solution"], row["ground_truth"]).correct == graded["is_correct"], graded


@given(st.text(), st.integers(-(10**12), 10**12))
def test_whatever_comes_before_the_number_stays_out_of_it(before: str, number: int) -> None:
    for written in (f"{number}", f"{number:,}", f"{number}.0"):
        assert verify(f"{before} {written}", str(number)).correct
        assert not verify(f"{before} {written}", str(number + 1)).correct


@given(st.text(alphabet="0123456789.,+-eE/$€%{}\\ \n٣５−x", max_size=60))
def test_no_text_of_number_parts_makes_it_raise(text: str) -> None:
    verify(text, "1")
    if last_number(text) is not None:
        check(text)
        assert verify(text, text).correct
