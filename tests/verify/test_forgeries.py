"""No wrong program passes, and none chooses to be unjudged: 120 ways to look right or like a failure of the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.verify.sandbox.host import NoIsolation, Sandbox
from engine.verify.sandbox.inside.namespaces import Limits
from tests.verify.forgeries import ALWAYS, BUILTIN_TESTS, BUILTINS, CHOICE_TESTS, CHOICES, FORGED, TESTS, WRONG

LIMITS = Limits(cpu_seconds=1, idle_seconds=1, seconds=5, memory=512)
SKIPPED = """import unittest
class Case(unittest.TestCase):
    def test_f(self): self.assertEqual(f(1), 7)
result = unittest.TestResult()
unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
assert result.wasSuccessful()"""


@pytest.fixture(scope="module", params=["isolated", "unsafe"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """In both modes, also where the program runs as the user of the tests."""
    try:
        sandbox = Sandbox(LIMITS, unsafe=request.param == "unsafe")
    except NoIsolation as refusal:
        pytest.skip(str(refusal))
    yield sandbox
    sandbox.close()


@pytest.mark.parametrize("name", WRONG)
def test_an_object_that_agrees_to_everything_passes_no_test_of_plain_values(sandbox: Sandbox, name: str) -> None:
    passed = [tests for tests in TESTS.values() if sandbox.run([WRONG[name]], tests).correct]
    assert passed == []


@pytest.mark.parametrize("name", BUILTIN_TESTS)
def test_the_tests_use_their_own_builtins(sandbox: Sandbox, name: str) -> None:
    """Whatever a program defines beside its entry point."""
    tests = f"def check(candidate):\n    {BUILTIN_TESTS[name]}\ncheck(solve)"
    for builtins in (BUILTINS, ALWAYS):
        program = f"{builtins}\ndef solve(x): return None"
        assert not sandbox.run([program], tests, setup="def solve(x):\n    pass\n", entry_point="solve").correct
        assert not sandbox.run([program], BUILTIN_TESTS[name].replace("candidate", "solve").replace("\n    ", "\n")).correct


@pytest.mark.parametrize("name", FORGED)
def test_a_program_that_replaces_its_server_gains_nothing(sandbox: Sandbox, name: str) -> None:
    passed = [tests for tests in (*TESTS.values(), SKIPPED) if sandbox.run([FORGED[name]], tests).correct]
    assert passed == []


@pytest.mark.parametrize("name", CHOICES)
def test_no_program_chooses_to_be_unjudged(sandbox: Sandbox, name: str) -> None:
    for tests in CHOICE_TESTS:
        assert not sandbox.run([CHOICES[name]], tests).correct  # raises if it is unjudged


def test_right_answers_pass_these_tests(sandbox: Sandbox) -> None:
    """So that the tests above fail for what the programs do."""
    right = "def f(x): return 7"
    for name in (
        "equal",
        "near",
        "near, by math",
        "in a list",
        "key",
        "type",
        "order",
        "chain",
        "map",
        "unittest",
        "almost equal",
        "message",
    ):
        assert sandbox.run([right], TESTS[name]).correct, name
    assert sandbox.run([right], SKIPPED).correct
    assert sandbox.run(["def f(x): return {1, 2}"], TESTS["difference of sets"]).correct
    assert sandbox.run(["def f(x): x(7)"], TESTS["callback"]).correct
    assert sandbox.run(["def f(x): x.sort()"], TESTS["in place"]).correct
    assert sandbox.run(["def f(x): raise ValueError('seven')"], TESTS["exception"]).correct
