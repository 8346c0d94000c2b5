"""Right programs pass everyday tests of them, whatever values these use; what is not supported is listed in docs/verifiers.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.verify.code import check
from engine.verify.sandbox.host import NoIsolation, Sandbox
from tests.support.paths import ROOT
from tests.verify.idioms import IDIOMS, UNSUPPORTED


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """Without isolation where the machine has none; these programs are harmless."""
    try:
        sandbox = Sandbox()
    except NoIsolation:
        sandbox = Sandbox(unsafe=True)
    yield sandbox
    sandbox.close()


def error_of(script: str) -> str:
    """The error that a script ends with; empty if there is none."""
    try:
        exec(compile(script, "script", "exec"), {"__name__": __name__})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_an_error_of_a_script_is_seen() -> None:
    assert error_of("assert 1 == 2, 'no'") == "AssertionError: no"


@pytest.mark.parametrize("name", [*IDIOMS, *UNSUPPORTED])
def test_they_are_right_in_one_process(name: str) -> None:
    """Run as any script: the table itself has no mistakes."""
    program, tests = {**IDIOMS, **UNSUPPORTED}[name]
    assert error_of(f"{program}\n{tests}") == ""


@pytest.mark.parametrize("name", IDIOMS)
def test_they_pass(sandbox: Sandbox, name: str) -> None:
    program, tests = IDIOMS[name]
    assert sandbox.run([program], tests) == (True, "all tests passed")


def test_what_is_not_supported_is_documented(sandbox: Sandbox) -> None:
    documented = (ROOT / "docs/verifiers.md").read_text()
    assert len(UNSUPPORTED) <= 6
    for name, (program, tests) in UNSUPPORTED.items():
        assert not sandbox.run([program], tests).correct, f"{name} passes now: move it to IDIOMS"
        assert name in documented


@pytest.mark.parametrize("name", [*IDIOMS, *UNSUPPORTED])
def test_their_tests_are_accepted(name: str) -> None:
    check({"tests": [({**IDIOMS, **UNSUPPORTED})[name][1]]}, unsafe=True)
