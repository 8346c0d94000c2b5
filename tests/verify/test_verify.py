"""Verifiers in general: names, custom tasks, the command line, and properties that every verifier must have."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.verify import VERIFIERS, exact, regex, verifier
from engine.verify.pool import Case, Pool
from tests.support.paths import ROOT

RULES = {
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_sentences", "keywords:existence"],
    "kwargs": [{}, {"num_sentences": 2, "relation": "at least"}, {"keywords": ["C++"]}],
}
TRUTHS: dict[str, Any] = {
    "contains": ["Paris", "the city of Paris"],
    "exact": "yes",
    "gsm8k": "1,000",
    "ifeval": RULES,
    "ifeval_loose": RULES,
    "math": "\\frac{1}{2}",
    "regex": "^a+b$",
}


def engine_verify(name: str, text: str) -> tuple[int, list[dict[str, Any]], str]:
    """Returns exit code, rows and stderr."""
    words = [sys.executable, "-m", "engine", "verify", "--workers", "1", "--verifier", name]
    done = subprocess.run(words, input=text.encode(), capture_output=True, cwd=ROOT, timeout=60)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr.decode()


def rows(*pairs: tuple[Any, Any]) -> str:
    return "".join(json.dumps({"response": response, "truth": truth}) + "\n" for response, truth in pairs)


@pytest.mark.parametrize("name", TRUTHS)
def test_every_name_leads_to_its_verifier(name: str) -> None:
    assert verifier(name).name == name
    verifier(name).check(TRUTHS[name])


def test_an_unknown_name_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"verifier=.gsm9k. is unknown; use one of .*exact.*gsm8k.*ifeval.*math"):
        verifier("gsm9k")


def test_verifiers_need_no_torch() -> None:
    names = ", ".join(map(repr, TRUTHS))
    code = f"import sys; from engine.verify import verifier, pool; [verifier(n) for n in ({names})]; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_looking_at_one_brings_no_other() -> None:
    code = "import sys; from engine.verify import verifier; verifier('gsm8k'); assert not {'sympy', 'langdetect', 'regex'} & {*sys.modules}"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("response", "truth", "correct"),
    [
        ("yes", "yes", True),
        (" yes\n", "yes", True),
        ("Yes", "yes", False),
        ("yes.", "yes", False),
        ("", "yes", False),
        ("é", "e\u0301", False),
    ],
)
def test_exact(response: str, truth: str, correct: bool) -> None:
    assert exact.verify(response, truth).correct is correct


@pytest.mark.parametrize("truth", ["", " ", None, 5])
def test_exact_refuses_a_truth_that_rewards_silence(truth: object) -> None:
    with pytest.raises(ValueError, match="must be a string that is not blank"):
        exact.check(truth)


@pytest.mark.parametrize(
    ("response", "pattern", "correct"),
    [
        ("abc", "b", True),
        ("abc", r"\Ab\Z", False),
        ("ABC", "(?i)b", True),
        ("a\nb", "^b$", False),
        ("a\nb", "(?m)^b$", True),
        ("", "b", False),
    ],
)
def test_regex(response: str, pattern: str, correct: bool) -> None:
    assert regex.verify(response, pattern).correct is correct


@pytest.mark.parametrize(
    ("truth", "why"),
    [
        ("(", "is not a valid pattern"),
        ("a*", "matches an empty response"),
        ("", "matches an empty response"),
        (5, "a string"),
        ("a" * 1001, "a string of at most 1000 characters"),
        ("(" * 1000, "is not usable: it is not a valid pattern|nested too deeply"),
        ("(" * 490 + "a" + ")" * 490, "nested too deeply"),
        ("(?:" * 50 + "a" + "{1,99})" * 50, "is not usable"),
        ("(?:a|b|ab)*" * 40 + "a", None),
    ],
)
def test_regex_refuses_a_pattern_that_is_none_or_asks_nothing(truth: object, why: str | None) -> None:
    if why is None:
        return regex.check(truth)
    with pytest.raises(ValueError, match=why):
        regex.check(truth)


def test_a_catastrophic_pattern_ends_on_any_thread() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(regex.verify("a" * 5000 + "b", "(a|aa)+$")))
    thread.start()
    thread.join(30)
    assert [verdict.reason for verdict in found] == ["time limit of 1 s"]


def test_the_command_judges_rows_in_order_and_counts_them() -> None:
    code, out, err = engine_verify("gsm8k", rows(("it is 1,000", "1000"), ("5", "6"), ("7", "7")))
    assert code == 0
    assert [row["correct"] for row in out] == [True, False, True]
    assert out[1] == {"correct": False, "reason": "last number is 5"}
    assert "3 rows: 2 correct (66.7%), 1 wrong, 0 not judged" in err


@pytest.mark.parametrize(
    ("name", "second", "complaint"),
    [
        ("gsm8k", "nonsense\n", "stdin:2: not valid JSON"),
        ("gsm8k", "[1]\n", "stdin:2: a row must be a JSON object"),
        ("gsm8k", rows((5, "6")), "stdin:2: response=5 must be a string"),
        ("gsm8k", '{"response": "5"}\n', "stdin:2: truth is missing"),
        ("gsm8k", rows(("5", "six")), "stdin:2: truth='six' must be a string with a number"),
        ("no-such", "", "verifier='no-such' is unknown"),
    ],
)
def test_the_command_names_the_line_that_is_no_row(name: str, second: str, complaint: str) -> None:
    code, _, err = engine_verify(name, rows(("1", "1")) + second)
    assert code == 1
    assert err.startswith(f"error: {complaint}"), err
    assert "Traceback" not in err


ANY = st.text(max_size=200) | st.text(alphabet="0123456789.,+-*/^_=(){}[]\\$%abfracsqrtboxedtext \n", max_size=120)


@given(st.lists(st.tuples(st.sampled_from(sorted(TRUTHS)), ANY), max_size=12), st.randoms())
@settings(max_examples=25, deadline=None)
def test_no_response_makes_a_verifier_raise_or_depend_on_its_neighbours(
    both_workers: Any, asked: list[tuple[str, str]], random: Any
) -> None:
    cases = [Case(verifier(name), response, TRUTHS[name]) for name, response in asked]
    one, two = both_workers
    answers = one.verify(cases)
    places = list(range(len(cases)))
    random.shuffle(places)
    assert two.verify([cases[place] for place in places]) == [answers[place] for place in places]
    assert one.dropped == two.dropped == 0


@pytest.fixture(scope="module")
def both_workers() -> Any:
    with Pool(1, max_dropped=0) as one, Pool(2, max_dropped=0) as two:
        yield one, two


def test_all_named_are_tried_here() -> None:
    assert set(TRUTHS) | {"code"} >= set(VERIFIERS)
