"""A pytest plugin: `pytest -p benchmarks.gpu.pytest_facts --facts F` appends the outcome of every test to F as it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.facts import Facts, read

WORDS = 400  # characters of a failure that are kept


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--facts", type=Path, default=None, help="append outcomes to this file, and leave out tests that passed in it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What passed before is not run again."""
    passed = {fact["test"] for fact in read(config.getoption("--facts")) if fact.get("outcome") == "passed"}
    left_out = [item for item in items if item.nodeid in passed]
    items[:] = [item for item in items if item.nodeid not in passed]
    config.hook.pytest_deselected(items=left_out)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # under xdist, the process that hears of every worker's tests
        config.pluginmanager.register(Recorder(Facts(config.getoption("--facts"))))


class Recorder:
    """Writes down how each test ended: of a test that passed its setup, how its body did."""

    def __init__(self, facts: Facts):
        self.facts = facts

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            words = {"error": str(report.longrepr)[-WORDS:]} if report.failed else {}
            self.facts.add({"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), **words})
