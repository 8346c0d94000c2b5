"""A pytest plugin: `pytest -p benchmarks.gpu.pytest_facts --facts F` appends the outcome of each test to F when it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.facts import Facts, read

MAX_CHARACTERS = 400  # of an error message


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--facts", type=Path, default=None, help="append outcomes to this file, and skip tests that have passed in it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that have passed before are not run again."""
    passed = {fact["test"] for fact in read(config.getoption("--facts")) if fact.get("outcome") == "passed"}
    deselected = [item for item in items if item.nodeid in passed]
    items[:] = [item for item in items if item.nodeid not in passed]
    config.hook.pytest_deselected(items=deselected)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # under xdist, only in the main process, which receives all reports
        config.pluginmanager.register(Recorder(Facts(config.getoption("--facts"))))


class Recorder:
    """Records the outcome of each test: that of its call, or of its setup if that did not pass."""

    def __init__(self, facts: Facts):
        self.facts = facts

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            message = {"error": str(report.longrepr)[-MAX_CHARACTERS:]} if report.failed else {}
            self.facts.add({"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), **message})
