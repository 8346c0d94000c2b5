"""The protocol of the benchmarks: all contenders are measured alternately in one run, and the results are written to a page.

Machines are noisy, so numbers are compared only within a run, as ratios within a round. A round measures every contender once, each in new
processes. Every round starts with a different contender. Reported are the median over rounds, the lowest and the highest.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "megatron-core", "transformers", "trl")
MARK = "reading: "  # prefix of the line in which a process reports its measurement

NUMBERS = (
    "Numbers are median (min..max) over rounds, with ratios computed within a round. Core seconds are the CPU seconds of all threads of a",
    "contender. Other users of the machine hardly change them, but they do not include the time that processes wait for each other.",
)

T = TypeVar("T")


@dataclass(frozen=True)
class Contender:
    """A program that is measured. `command` starts its processes, each of which calls `report` at its end."""

    name: str
    what: str  # one line for the page
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """One contender in one round: the amount of work, the wall-clock seconds, the CPU seconds summed over threads, and the peak resident
    memory of each process in MiB."""

    amount: float
    seconds: float
    core_seconds: float
    peak_mb: tuple[float, ...]
    checks: Mapping[str, float] = field(default_factory=dict)  # sums that must agree between contenders

    @property
    def rate(self) -> float:
        return self.amount / self.seconds

    @property
    def core_rate(self) -> float:
        """Work per CPU second. Other users of the machine hardly change it; waiting is not counted."""
        return self.amount / self.core_seconds


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of a few values."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}..{self.high:.{digits}f})"


@dataclass(frozen=True)
class Target:
    """`who` should be at least `ratio` times as fast as the fastest of `against`."""

    who: str
    against: tuple[str, ...]
    ratio: float


Readings = dict[str, list[Reading]]  # by contender, by round


def rotated(items: Sequence[T], by: int) -> list[T]:
    """`items` from index `by` on, followed by those before it."""
    by %= len(items)
    return [*items[by:], *items[:by]]


def measure(contenders: Sequence[Contender], rounds: int, read: Callable[[Contender, int], Reading]) -> Readings:
    """Calls read(contender, round) for each contender in each round. Every round starts with the next contender."""
    readings: Readings = {contender.name: [] for contender in contenders}
    for round_ in range(rounds):
        for contender in rotated(contenders, round_):
            reading = read(contender, round_)
            readings[contender.name].append(reading)
            print(f"round {round_ + 1}/{rounds}  {contender.name:12} {reading.rate:9.1f}/s  {sum(reading.peak_mb):7.0f} MiB", flush=True)
    return readings


def read_processes(contender: Contender, *arguments: str) -> Reading:
    """Run `contender` with additional arguments and merge the reports of its processes. RuntimeError with the end of stderr if it fails."""
    environment = {**os.environ, **contender.environment}
    done = subprocess.run([*contender.command, *arguments], env=environment, capture_output=True, text=True)
    parts = [json.loads(line.split(MARK, 1)[1]) for line in done.stdout.splitlines() if MARK in line]
    if done.returncode or not parts:
        raise RuntimeError(f"{contender.name} ended with status {done.returncode} and {len(parts)} readings:\n{done.stderr[-3000:]}")
    return merged(parts)


def report(amount: float, seconds: float, core_seconds: float, checks: Mapping[str, float]) -> None:
    """Called once by each measured process, with its share of the work, the seconds of the whole pass, its CPU seconds and its checks."""
    part = {"amount": amount, "seconds": seconds, "core_seconds": core_seconds, "peak_mb": peak_resident_mb(), "checks": dict(checks)}
    os.write(1, f"{MARK}{json.dumps(part)}\n".encode())  # one write, so that lines of two processes do not interleave


def peak_resident_mb() -> float:
    """The peak resident memory of this process in MiB. On Linux ru_maxrss starts at the parent's size, so VmHWM is read there."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def merged(parts: Sequence[Mapping[str, Any]]) -> Reading:
    """Adds work, CPU time and checks over processes. The time is that of the slowest process."""
    checks: dict[str, float] = {}
    for part in parts:
        for name, value in part["checks"].items():
            checks[name] = checks.get(name, 0.0) + value
    amount, core_seconds = sum(part["amount"] for part in parts), sum(part["core_seconds"] for part in parts)
    return Reading(amount, max(part["seconds"] for part in parts), core_seconds, tuple(part["peak_mb"] for part in parts), checks)


def rate(readings: Sequence[Reading]) -> Spread:
    return Spread.of([reading.rate for reading in readings])


def core_rate(readings: Sequence[Reading]) -> Spread:
    return Spread.of([reading.core_rate for reading in readings])


def ratio(readings: Readings, who: str, against: str, speed: Callable[[Reading], float] = lambda reading: reading.rate) -> Spread:
    """The speed of `who` divided by that of `against`, round by round."""
    return Spread.of([speed(ours) / speed(theirs) for ours, theirs in zip(readings[who], readings[against], strict=True)])


def core_ratio(readings: Readings, who: str, against: str) -> Spread:
    """The same, in work per CPU second."""
    return ratio(readings, who, against, lambda reading: reading.core_rate)


def strongest(readings: Readings, names: Sequence[str]) -> str:
    """The contender with the highest median rate."""
    return max(names, key=lambda name: rate(readings[name]).median)


def environment() -> dict[str, Any]:
    """Commit, versions and machine, which a reader needs to reproduce the numbers."""
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),  # load average before the run; above 0, other processes use the machine
    }


def page(
    title: str,
    notes: Sequence[str],
    contenders: Sequence[Contender],
    readings: Readings,
    targets: Sequence[Target],
    facts: Mapping[str, Any],
    unit: str = "tokens",
    digits: int = 1,
) -> str:
    """The Markdown page: contenders, targets, and the environment. `unit` is the unit of work, `digits` the decimal places of rates."""
    base = contenders[0].name
    head = f"| contender | what | {unit}/s | {base} / it | {unit}/core second | {base} / it | peak MiB, all (largest) |\n{'|---' * 7}|"
    rows = [_row(c, readings, base, digits) for c in contenders]
    verdicts = [verdict(readings, target) for target in targets]
    facts_ = [f"- {name}: {value}" for name, value in facts.items()]
    blocks = [[f"# {title}"], [*notes, *NUMBERS], [head, *rows], ["## Targets"], verdicts, ["## Environment"], facts_]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def verdict(readings: Readings, target: Target) -> str:
    """One line: the ratio to the fastest measured contender of `target.against`, and whether the target is met."""
    present = [name for name in target.against if name in readings]
    if target.who not in readings or not present:
        return f"- {target.who} against {' | '.join(target.against)}: not measured (target {target.ratio:g}x)"
    fastest = strongest(readings, present)
    measured = ratio(readings, target.who, fastest)
    outcome = "met" if measured.median >= target.ratio else "MISSED"
    on_cores = core_ratio(readings, target.who, fastest).text(2)
    return f"- {target.who} against {fastest}: {measured.text(2)}x, target {target.ratio:g}x: {outcome} (per core second {on_cores}x)"


def write(folder: Path, name: str, text: str, readings: Readings, facts: Mapping[str, Any]) -> list[Path]:
    """Write `name`.md and `name`.json into `folder`; the latter has every reading."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {"facts": dict(facts), "readings": {who: [asdict(reading) for reading in rounds] for who, rounds in readings.items()}}
    paths = [folder / f"{name}.md", folder / f"{name}.json"]
    for path, content in zip(paths, (text, json.dumps(body, indent=1) + "\n"), strict=True):
        path.write_text(content, encoding="utf-8")
    return paths


def _row(contender: Contender, readings: Readings, base: str, digits: int) -> str:
    rounds, compared = readings[contender.name], (readings, base, contender.name)
    speeds = [rate(rounds).text(digits), ratio(*compared).text(2), core_rate(rounds).text(digits), core_ratio(*compared).text(2)]
    return f"| {' | '.join([contender.name, contender.what, *speeds, _memory(rounds)])} |"


def _memory(readings: Sequence[Reading]) -> str:
    return f"{max(sum(r.peak_mb) for r in readings):.0f} ({max(max(r.peak_mb) for r in readings):.0f})"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or sys.platform
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
