"""python -m benchmarks programs: how many programs a second the code verifier judges, and what its walls cost.

Every solution of HumanEval, which should pass, and each less its last line, which should fail. Contenders judge the same programs in the
same round. The exit status is 1 when a verdict is not as it should be or the target is missed.
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
TARGET = 15.0  # programs a second on two cores
DATA = Path(__file__).parents[3] / "shared/data/humaneval.jsonl"


class Program(NamedTuple):
    """A response, what it is judged against, and what should come of it."""

    response: str
    truth: dict[str, str]
    passes: bool


WALLED = Contender("code", f"the verifier, {WORKERS} workers")
UNSAFE = Contender("code --unsafe-code", "the same without namespaces and without a user of its own: limits and filter only")
BARE = Contender("python", "no sandbox: a new interpreter for each, one after the other, tests in the program's text, exit status 0 passes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=DATA, metavar="F", help="HumanEval as jsonl")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the page and its readings there")
    parser.add_argument("--name", default="programs", help="their name")


def main(arguments: argparse.Namespace) -> int:
    """Prints the page as Markdown."""
    judged = programs(arguments.data)
    verifiers = {WALLED.name: CODE, UNSAFE.name: UNSAFE_CODE}
    facts = environment()
    readings = measure((WALLED, UNSAFE, BARE), ROUNDS, lambda contender, _: read(verifiers.get(contender.name), judged))
    text = page(readings, len(judged), facts)
    if arguments.out:
        write(arguments.out, arguments.name, text, readings, facts)
    print(text)
    right = all(reading.checks["right"] == len(judged) for reading in readings[WALLED.name])
    return int(not right or rate(readings[WALLED.name]).median < TARGET)


def programs(path: Path) -> list[Program]:
    """Every solution, then every shortened one."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    whole = [Program(row["canonical_solution"], row, True) for row in rows]
    return whole + [one._replace(response="\n".join(one.response.rstrip().split("\n")[:-1]), passes=False) for one in whole]


def read(verifier: Verifier | None, judged: Sequence[Program]) -> Reading:
    """One contender once, its workers and sandboxes already started."""
    with Pool(WORKERS) as pool:
        judge = partial(in_pool, pool, verifier) if verifier else bare
        judge(judged[:: len(judged) // 16])
        before, start = _core_seconds(), time.perf_counter()
        right = judge(judged)
        seconds = time.perf_counter() - start
        return Reading(len(judged), seconds, _core_seconds() - before, (), {"right": right})


def in_pool(pool: Pool, verifier: Verifier, judged: Sequence[Program]) -> int:
    """How many verdicts are right."""
    answers = pool.verify([Case(verifier, one.response, one.truth) for one in judged])
    return sum(isinstance(answer, Verdict) and answer.correct == one.passes for answer, one in zip(answers, judged, strict=True))


def bare(judged: Sequence[Program]) -> int:
    """The same, by exit status."""
    right = 0
    for response, truth, passes in judged:
        text = f"{truth['prompt']}{response}\n{truth['test']}\ncheck({truth['entry_point']})"
        done = subprocess.run([sys.executable, "-I", "-S", "-c", text], capture_output=True, timeout=60)
        right += (done.returncode == 0) == passes
    return right


def _core_seconds() -> float:
    """Of this process and all below it, those included that have ended and been waited for."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(one.user + one.system + one.children_user + one.children_system for one in times)


def page(readings: Readings, count: int, facts: dict[str, Any]) -> str:
    """The Markdown page."""
    head = ["contender", "right", "programs/s", f"it / {BARE.name}", "programs/core second", f"it / {BARE.name}"]
    outcome = "met" if rate(readings[WALLED.name]).median >= TARGET else "MISSED"
    return "\n".join(
        [
            "# Programs",
            "",
            f"Made by `python -m benchmarks programs`. {count} programs: HumanEval's solutions, which pass, and each less its last line,",
            f"which fails. Median (min..max) of {ROUNDS} rounds, ratios within a round. Processes are started before the clock is.",
            "",
            *table(head, [_row(readings, contender.name, count) for contender in (WALLED, UNSAFE, BARE)]),
            "",
            *(f"- {contender.name}: {contender.what}" for contender in (WALLED, UNSAFE, BARE)),
            "",
            f"Target: {TARGET:g} programs a second on two cores: {outcome}.",
            "",
            "## Where",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
        ]
    )


def _row(readings: Readings, name: str, count: int) -> list[str]:
    found = readings[name]
    right = min(int(reading.checks["right"]) for reading in found)
    ratios = (ratio(readings, name, BARE.name).text(2), core_ratio(readings, name, BARE.name).text(2))
    return [name, f"{right} of {count}", rate(found).text(1), ratios[0], core_rate(found).text(1), ratios[1]]
