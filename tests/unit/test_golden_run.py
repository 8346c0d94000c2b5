"""The comparison of golden runs detects differences. The runs take a minute and are started manually."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from tests.support.golden_run import MACHINE_METRICS, differences

BEFORE = {"tiny": {"metrics": [{"kind": "step", "step": 0, "loss": 5.25, "tokens": 7}], "responses": "abc"}}


def changed(**values: Any) -> dict[str, Any]:
    after = deepcopy(BEFORE)
    after["tiny"]["metrics"][0] |= values  # type: ignore[index,operator]
    return after


@pytest.mark.parametrize(("after", "exact", "expected"), [
    (changed(), True, []),
    (changed(loss=5.25 + 1e-12), True, ["tiny: step 0: loss was 5.25, and is 5.250000000001"]),
    (changed(loss=5.25 + 1e-12), False, []),
    (changed(loss=5.3), False, ["tiny: step 0: loss was 5.25, and is 5.3"]),
    (changed(tokens=8), False, ["tiny: step 0: tokens was 7, and is 8"]),
    ({"tiny": {"metrics": [], "responses": "abc"}}, True, ["tiny: 1 lines of metrics were written, and now 0"]),
    ({"tiny": BEFORE["tiny"] | {"responses": "abd"}}, True, ["tiny: the sampled responses or their rewards differ"]),
    ({"tiny": BEFORE["tiny"] | {"responses": "abd"}}, False, []),
])  # fmt: skip
def test_differences_are_named(after: dict[str, Any], exact: bool, expected: list[str]) -> None:
    assert differences(BEFORE, after, exact=exact) == expected


@pytest.mark.parametrize(("name", "left_out"), [
    ("time", True), ("time/generate", True), ("rollout/tokens_per_second", True), ("memory_gb", True), ("policy/loss", False),
    ("policy/lr", False), ("tokens", False), ("rollout/length", False),
])  # fmt: skip
def test_metrics_of_the_machine_are_ignored(name: str, left_out: bool) -> None:
    assert bool(MACHINE_METRICS.match(name)) == left_out
