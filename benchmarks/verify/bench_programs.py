"""python -m benchmarks programs: Measure how many programs per second the code verifier runs, and the overhead of its sandbox.

The programs are HumanEval's solutions, which must pass, and the same without their last line, which must fail. In a round, all contenders
run the same programs. The exit status is 1 if a verdict is wrong or the target is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.kernels.bench_kernels import table
from benchmarks.support.timing import Contender, Reading, Readings, core_rate, core_ratio, environment, measure, rate, ratio, write
from engine.verify.code import CODE, UNSAFE_CODE
from engine.verify.pool import Case, Pool
from engine.verify.verdict import Verdict, Verifier

ROUNDS = 5
WORKERS = 2
TARGET = 15.0  # programs per second on two cores
DATA = Path(__file__).parents[3] / "shared/data/humaneval.jsonl"


class Program(NamedTuple):
    """A response, its tests, and whether it should pass."""

    response: str
    truth: dict[str, str]
    passes: bool


SANDBOXED = Contender("code", f"the verifier, {WORKERS} workers")
UNSAFE = Contender(
    "code --unsafe-code", "the same without namespaces and without an unprivileged user: only limits and the system call filter"
)
BARE = Contender("python", "no sandbox: a new interpreter per program, one at a time, tests appended to the program, exit status 0 passes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=DATA, metavar="F", help="HumanEval as jsonl")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the page and its numbers into this folder")
    parser.add_argument("--name", default="programs", help="file name of both (default: %(default)s)")


def main(arguments: argparse.Namespace) -> int:
    """Print the page as Markdown."""
    samples = programs(arguments.data)
    verifiers = {SANDBOXED.name: CODE, UNSAFE.name: UNSAFE_CODE}
    facts = environment()
    readings = measure((SANDBOXED, UNSAFE, BARE), ROUNDS, lambda contender, _: read(verifiers.get(contender.name), samples))
    text = page(readings, len(samples), facts)
    if arguments.out:
        write(arguments.out, arguments.name, text, readings, facts)
    print(text)
    right = all(reading.checks["right"] == len(samples) for reading in readings[SANDBOXED.name])
    return int(not right or rate(readings[SANDBOXED.name]).median < TARGET)


def programs(path: Path) -> list[Program]:
    """All solutions, then all truncated ones."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    solutions = [Program(row["canonical_solution"], row, True) for row in rows]
    return solutions + [one._replace(response="\n".join(one.response.rstrip().split("\n")[:-1]), passes=False) for one in solutions]


def read(verifier: Verifier | None, samples: Sequence[Program]) -> Reading:
    """Measure one contender once, with workers and sandboxes already started."""
    with Pool(WORKERS) as pool:
        run = partial(in_pool, pool, verifier) if verifier else bare
        run(samples[:: len(samples) // 16])
        before, start = _core_seconds(), time.perf_counter()
        correct = run(samples)
        seconds = time.perf_counter() - start
        return Reading(len(samples), seconds, _core_seconds() - before, (), {"right": correct})


def in_pool(pool: Pool, verifier: Verifier, samples: Sequence[Program]) -> int:
    """The number of correct verdicts of the verifier."""
    verdicts = pool.verify([Case(verifier, one.response, one.truth) for one in samples])
    return sum(isinstance(verdict, Verdict) and verdict.correct == one.passes for verdict, one in zip(verdicts, samples, strict=True))


def bare(samples: Sequence[Program]) -> int:
    """The number of correct verdicts by exit status, without a sandbox."""
    correct = 0
    for response, truth, passes in samples:
        text = f"{truth['prompt']}{response}\n{truth['test']}\ncheck({truth['entry_point']})"
        result = subprocess.run([sys.executable, "-I", "-S", "-c", text], capture_output=True, timeout=60)
        correct += (result.returncode == 0) == passes
    return correct


def _core_seconds() -> float:
    """CPU seconds of this process and its descendants, including those that have ended and been waited for."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(one.user + one.system + one.children_user + one.children_system for one in times)


def page(readings: Readings, count: int, facts: dict[str, Any]) -> str:
    """The Markdown page."""
    head = ["contender", "correct", "programs/s", f"/ {BARE.name}", "programs/core second", f"/ {BARE.name}"]
    outcome = "met" if rate(readings[SANDBOXED.name]).median >= TARGET else "MISSED"
    return "\n".join(
        [
            "# Programs",
            "",
            f"Made by `python -m benchmarks programs`. {count} programs: HumanEval's solutions, which pass, and the same without their",
            f"last line, which fail. Median (min..max) of {ROUNDS} rounds, ratios within a round. Processes are started before the timing.",
            "",
            *table(head, [_row(readings, contender.name, count) for contender in (SANDBOXED, UNSAFE, BARE)]),
            "",
            *(f"- {contender.name}: {contender.what}" for contender in (SANDBOXED, UNSAFE, BARE)),
            "",
            f"Target: {TARGET:g} programs per second on two cores: {outcome}.",
            "",
            "## Environment",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
        ]
    )


def _row(readings: Readings, name: str, count: int) -> list[str]:
    rounds = readings[name]
    correct = min(int(reading.checks["right"]) for reading in rounds)
    ratios = (ratio(readings, name, BARE.name).text(2), core_ratio(readings, name, BARE.name).text(2))
    return [name, f"{correct} of {count}", rate(rounds).text(1), ratios[0], core_rate(rounds).text(1), ratios[1]]
