"""The protocol of every benchmark: contenders side by side in one run, and a page that says how it came out.

Machines are noisy, so only numbers of one run are compared, as ratios within a round: a round measures every contender once, each in
processes of its own, and every round begins with another one. What is reported is the median over rounds and the lowest and highest.
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

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "megatron-core", "transformers", "trl")
MARK = "reading: "  # begins the line by which a process tells what it measured

T = TypeVar("T")


@dataclass(frozen=True)
class Contender:
    """Who is measured: `command` starts its processes, each of which ends with `report`."""

    name: str
    what: str  # one line for the page
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """One contender in one round: `amount` of work done in `seconds`, and the peak resident memory of each of its processes, MiB."""

    amount: float
    seconds: float
    peak_mb: tuple[float, ...]
    checks: Mapping[str, float] = field(default_factory=dict)  # sums that should be equal whoever computed them

    @property
    def rate(self) -> float:
        return self.amount / self.seconds


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
    """`who` should be at least `ratio` times as fast as the strongest of `against`."""

    who: str
    against: tuple[str, ...]
    ratio: float


Readings = dict[str, list[Reading]]  # by contender, by round


def rotated(items: Sequence[T], by: int) -> list[T]:
    """`items` from place `by` on, then those before it."""
    by %= len(items)
    return [*items[by:], *items[:by]]


def measure(contenders: Sequence[Contender], rounds: int, read: Callable[[Contender, int], Reading]) -> Readings:
    """read(contender, round) for each contender in each round, every round beginning with the next one."""
    found: Readings = {contender.name: [] for contender in contenders}
    for round_ in range(rounds):
        for contender in rotated(contenders, round_):
            reading = read(contender, round_)
            found[contender.name].append(reading)
            print(f"round {round_ + 1}/{rounds}  {contender.name:12} {reading.rate:9.1f}/s  {sum(reading.peak_mb):7.0f} MiB", flush=True)
    return found


def read_processes(contender: Contender, *arguments: str) -> Reading:
    """Start `contender` with more arguments and merge what its processes report; RuntimeError with their last words if they fail."""
    environment = {**os.environ, **contender.environment}
    done = subprocess.run([*contender.command, *arguments], env=environment, capture_output=True, text=True)
    parts = [json.loads(line.split(MARK, 1)[1]) for line in done.stdout.splitlines() if MARK in line]
    if done.returncode or not parts:
        raise RuntimeError(f"{contender.name} ended with {done.returncode} and {len(parts)} readings:\n{done.stderr[-3000:]}")
    return merged(parts)


def report(amount: float, seconds: float, checks: Mapping[str, float]) -> None:
    """Called once by each process that is measured: its share of the work and of the checks, and how long the common pass took."""
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    # In one write, or lines of two ranks could interleave.
    os.write(1, f"{MARK}{json.dumps({'amount': amount, 'seconds': seconds, 'peak_mb': peak_mb, 'checks': dict(checks)})}\n".encode())


def merged(parts: Sequence[Mapping[str, Any]]) -> Reading:
    """Work and checks add up over processes, the slowest sets the time."""
    checks: dict[str, float] = {}
    for part in parts:
        for name, value in part["checks"].items():
            checks[name] = checks.get(name, 0.0) + value
    return Reading(sum(p["amount"] for p in parts), max(p["seconds"] for p in parts), tuple(p["peak_mb"] for p in parts), checks)


def rate(readings: Sequence[Reading]) -> Spread:
    return Spread.of([reading.rate for reading in readings])


def ratio(readings: Readings, who: str, against: str) -> Spread:
    """How many times as fast as `against` `who` was, round by round."""
    return Spread.of([ours.rate / theirs.rate for ours, theirs in zip(readings[who], readings[against], strict=True)])


def strongest(readings: Readings, names: Sequence[str]) -> str:
    """The contender with the highest median rate."""
    return max(names, key=lambda name: rate(readings[name]).median)


def environment() -> dict[str, Any]:
    """What a reader needs to know of this machine and this tree to run the same again."""
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),  # of the machine before the run: above 0, others were using it
    }


def page(
    title: str,
    notes: Sequence[str],
    contenders: Sequence[Contender],
    readings: Readings,
    targets: Sequence[Target],
    facts: Mapping[str, Any],
) -> str:
    """The Markdown page: every contender, every target as it came out, and where."""
    base = contenders[0].name
    head = f"| contender | what | tokens/s: median (min..max) | {base} / it | peak MiB, all (largest) |\n|---|---|---|---|---|"
    rows = [_row(c, readings, base) for c in contenders]
    verdicts = [verdict(readings, target) for target in targets]
    facts_ = [f"- {name}: {value}" for name, value in facts.items()]
    parts = [f"# {title}", "\n".join(notes), "\n".join([head, *rows]), "## Targets", "\n".join(verdicts), "## Where", "\n".join(facts_)]
    return "\n\n".join(parts) + "\n"


def verdict(readings: Readings, target: Target) -> str:
    """One line: the ratio against the strongest of those that were measured, and whether it is enough."""
    present = [name for name in target.against if name in readings]
    if target.who not in readings or not present:
        return f"- {target.who} against {' | '.join(target.against)}: not measured (target {target.ratio:g}x)"
    peer = strongest(readings, present)
    found = ratio(readings, target.who, peer)
    outcome = "met" if found.median >= target.ratio else "MISSED"
    return f"- {target.who} against {peer}: {found.text(2)}x, target {target.ratio:g}x: {outcome}"


def write(folder: Path, name: str, text: str, readings: Readings, facts: Mapping[str, Any]) -> list[Path]:
    """`name`.md and `name`.json in `folder`, the latter with every reading."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {"facts": dict(facts), "readings": {who: [asdict(reading) for reading in found] for who, found in readings.items()}}
    paths = [folder / f"{name}.md", folder / f"{name}.json"]
    for path, content in zip(paths, (text, json.dumps(body, indent=1) + "\n"), strict=True):
        path.write_text(content, encoding="utf-8")
    return paths


def _row(contender: Contender, readings: Readings, base: str) -> str:
    found = readings[contender.name]
    faster = ratio(readings, base, contender.name)
    return f"| {contender.name} | {contender.what} | {rate(found).text(1)} | {faster.text(2)} | {_memory(found)} |"


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
