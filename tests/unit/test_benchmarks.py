"""The protocol of the benchmarks: statistics and pages with fake contenders, and shares and losses of the real ones."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.__main__ import COMMANDS, summary
from benchmarks.support import timing
from benchmarks.support.timing import Contender, Reading, Readings, Spread, Target
from benchmarks.training import bench_train, rlvr_baselines
from benchmarks.training.train_baselines import PASSES, balanced
from engine.algorithms.rlvr.step import RLVRTrainer
from engine.types import Sample

OURS, FAST, SLOW = (Contender(name, f"what {name} is") for name in ("ours", "fast", "slow"))


def readings() -> Readings:
    """100 tokens per pass. ours / fast: 1.5, 2, 4 in the three rounds; ours / slow: 10, 10, 10."""
    seconds = {"ours": (2.0, 1.0, 1.0), "fast": (3.0, 2.0, 4.0), "slow": (20.0, 10.0, 10.0)}
    return {name: [Reading(100, s, 4 * s, (300.0 * s, 50.0)) for s in values] for name, values in seconds.items()}


def test_spread_is_median_and_extremes() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([4.0, 1.0]) == Spread(2.5, 1.0, 4.0)
    assert Spread(2.0, 1.0, 3.0).text(1) == "2.0 (1.0..3.0)"


def test_ratios_are_taken_within_a_round() -> None:
    assert timing.ratio(readings(), "ours", "fast") == Spread(2.0, 1.5, 4.0)
    assert timing.ratio(readings(), "ours", "slow") == Spread(10.0, 10.0, 10.0)  # although the machine's speed changed by a factor of 2
    assert timing.rate(readings()["fast"]) == Spread(100 / 3.0, 25.0, 50.0)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_is_a_sentence(command: str) -> None:
    text = summary(COMMANDS[command])
    assert text[0].isupper()
    assert text.endswith(".")


def test_a_target_is_compared_with_the_fastest_peer() -> None:
    assert timing.strongest(readings(), ["slow", "fast"]) == "fast"
    assert "ours against fast: 2.00 (1.50..4.00)x, target 2x: met" in timing.verdict(readings(), Target("ours", ("slow", "fast"), 2.0))
    assert "target 2.1x: MISSED" in timing.verdict(readings(), Target("ours", ("fast",), 2.1))
    assert "not measured" in timing.verdict(readings(), Target("ours", ("absent",), 2.0))


def test_rounds_rotate_and_measure_each_contender_once() -> None:
    seen: list[tuple[int, str]] = []

    def read(contender: Contender, round_: int) -> Reading:
        seen.append((round_, contender.name))
        return Reading(1, 1.0, 1.0, (1.0,))

    results = timing.measure([OURS, FAST, SLOW], 4, read)
    order = [[name for at, name in seen if at == round_] for round_ in range(4)]
    assert order == [["ours", "fast", "slow"], ["fast", "slow", "ours"], ["slow", "ours", "fast"], ["ours", "fast", "slow"]]
    assert {name: len(values) for name, values in results.items()} == {"ours": 4, "fast": 4, "slow": 4}


def test_processes_of_a_contender_are_merged() -> None:
    part = {"amount": 10, "seconds": 2.0, "core_seconds": 4.0, "peak_mb": 5.0, "checks": {"loss_sum": 1.5}}
    merged = timing.merged([part, part | {"amount": 20, "seconds": 3.0, "peak_mb": 7.0}])
    assert merged == Reading(30, 3.0, 8.0, (5.0, 7.0), {"loss_sum": 3.0})
    assert (merged.rate, merged.core_rate) == (10.0, 3.75)


def test_a_process_reports_its_own_memory() -> None:
    use = "from benchmarks.support.timing import report; report(3, 0.5, 0.75, {'loss_sum': 2.0})"
    code = f"import sys; x = bytearray(int(sys.argv[1]) << 20); {use}"
    process = Contender("process", "", (sys.executable, "-c", code))
    small, large = (timing.read_processes(process, size) for size in ("1", "200"))
    assert (small.amount, small.seconds, small.core_seconds, dict(small.checks)) == (3, 0.5, 0.75, {"loss_sum": 2.0})
    assert large.peak_mb[0] - small.peak_mb[0] == pytest.approx(199, abs=20)


def test_a_failing_process_raises_with_its_stderr() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)broken ended with status 1 and 0 readings:.*out of luck"):
        timing.read_processes(Contender("broken", "", (sys.executable, "-c", "raise SystemExit('out of luck')")))


def test_page_and_json_contain_all_readings(tmp_path: Path) -> None:
    facts = timing.environment()
    text = timing.page("Title", ["A note."], [OURS, FAST, SLOW], readings(), [Target("ours", ("fast",), 5.0)], facts)
    assert "| slow | what slow is | 10.0 (5.0..10.0) | 10.00 (10.00..10.00) | 2.5 (1.2..2.5) | 10.00 (10.00..10.00) | 6050 (6000) |" in text
    assert all(f"| {c.name} | {c.what} |" in text for c in (OURS, FAST, SLOW))
    assert "MISSED" in text
    assert all(f"- {name}: {facts[name]}" in text for name in ("commit", "python", *timing.PACKAGES, "cpu", "cores"))
    page, data = timing.write(tmp_path / "results", "fake_cpu2_2026-01-01", text, readings(), facts)
    assert page.read_text(encoding="utf-8") == text
    assert [r["seconds"] for r in json.loads(data.read_text())["readings"]["fast"]] == [3.0, 2.0, 4.0]


def test_different_losses_are_an_error() -> None:
    def pass_(loss: float) -> list[Reading]:
        return [Reading(1, 1.0, 1.0, (1.0,), {"loss_sum": loss, "trained": 2.0})]

    assert bench_train._agree({"ours-1x2": pass_(3.0), "plain-1x2": pass_(3.00003)}) == pytest.approx(1e-5, rel=1e-3)
    for wrong in (3.0006, float("nan")):
        with pytest.raises(ValueError, match="plain-1x2: loss"):
            bench_train._agree({"ours-1x2": pass_(3.0), "plain-1x2": pass_(wrong)})


def test_shares_are_balanced_and_complete() -> None:
    lengths = [50, 10, 30, 20, 60, 40, 10]
    samples = [Sample(np.zeros(n + 1, np.int32), np.ones(n, np.uint8)) for n in lengths]
    shares = balanced(samples, 2)
    assert sorted(id(s) for share in shares for s in share) == sorted(id(s) for s in samples)
    assert [sum(s.length for s in share) for share in shares] == [110, 110]


def test_every_contender_is_described_and_runs() -> None:
    assert bench_train.WHAT.keys() == PASSES.keys()
    assert {name for target in bench_train.TARGETS for name in (target.who, *target.against)} <= PASSES.keys()


def test_the_generation_of_an_rlvr_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RLVRTrainer, "_generate", lambda trainer, step, request: step)
    empty: dict[str, Any] = dict.fromkeys((field.name for field in fields(RLVRTrainer)), None)
    watch = rlvr_baselines.Stopwatch()
    request: Any = None
    assert rlvr_baselines._timed(RLVRTrainer(**empty), watch)._generate(3, request) == 3
    assert watch.generation[0] > 0
