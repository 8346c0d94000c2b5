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

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "megatron-core", "transformers", "trl")
MARK = "reading: "  # begins the line by which a process tells what it measured

NUMBERS = (
    "Numbers are median (min..max) over rounds, ratios taken within a round. Core seconds are those that threads of the contender ran:",
    "unlike seconds they hardly change when others use the machine, but waiting of processes for each other does not show in them.",
)

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
    """One contender in one round: `amount` of work done in `seconds`, the seconds that its threads held a core, summed, and the peak
    resident memory of each of its processes, MiB."""

    amount: float
    seconds: float
    core_seconds: float
    peak_mb: tuple[float, ...]
    checks: Mapping[str, float] = field(default_factory=dict)  # sums that should be equal whoever computed them

    @property
    def rate(self) -> float:
        return self.amount / self.seconds

    @property
    def core_rate(self) -> float:
        """Work per second on a core: other users of the machine hardly change it, and waiting is free."""
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


def report(amount: float, seconds: float, core_seconds: float, checks: Mapping[str, float]) -> None:
    """Called once by each process that is measured: its share of work, core time and checks, and how long the common pass took."""
    part = {"amount": amount, "seconds": seconds, "core_seconds": core_seconds, "peak_mb": peak_resident_mb(), "checks": dict(checks)}
    os.write(1, f"{MARK}{json.dumps(part)}\n".encode())  # in one write, or lines of two processes could interleave


def peak_resident_mb() -> float:
    """The most memory this process has held, MiB. Linux lets ru_maxrss begin at the parent's size, so it is asked only elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def merged(parts: Sequence[Mapping[str, Any]]) -> Reading:
    """Work, core time and checks add up over processes; the slowest sets the time."""
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
    """How many times as fast as `against` `who` was, round by round."""
    return Spread.of([speed(ours) / speed(theirs) for ours, theirs in zip(readings[who], readings[against], strict=True)])


def core_ratio(readings: Readings, who: str, against: str) -> Spread:
    """The same, in work per second on a core."""
    return ratio(readings, who, against, lambda reading: reading.core_rate)


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
    unit: str = "tokens",
    digits: int = 1,
) -> str:
    """The Markdown page: every contender, every target as it came out, and where. `unit` is what work is counted in, and
    `digits` how many follow the point of its rates."""
    base = contenders[0].name
    head = f"| contender | what | {unit}/s | {base} / it | {unit}/core second | {base} / it | peak MiB, all (largest) |\n{'|---' * 7}|"
    rows = [_row(c, readings, base, digits) for c in contenders]
    verdicts = [verdict(readings, target) for target in targets]
    facts_ = [f"- {name}: {value}" for name, value in facts.items()]
    blocks = [[f"# {title}"], [*notes, *NUMBERS], [head, *rows], ["## Targets"], verdicts, ["## Where"], facts_]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def verdict(readings: Readings, target: Target) -> str:
    """One line: the ratio against the strongest of those that were measured, and whether it is enough."""
    present = [name for name in target.against if name in readings]
    if target.who not in readings or not present:
        return f"- {target.who} against {' | '.join(target.against)}: not measured (target {target.ratio:g}x)"
    peer = strongest(readings, present)
    found = ratio(readings, target.who, peer)
    outcome = "met" if found.median >= target.ratio else "MISSED"
    on_cores = core_ratio(readings, target.who, peer).text(2)
    return f"- {target.who} against {peer}: {found.text(2)}x, target {target.ratio:g}x: {outcome} (per core second {on_cores}x)"


def write(folder: Path, name: str, text: str, readings: Readings, facts: Mapping[str, Any]) -> list[Path]:
    """`name`.md and `name`.json in `folder`, the latter with every reading."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {"facts": dict(facts), "readings": {who: [asdict(reading) for reading in found] for who, found in readings.items()}}
    paths = [folder / f"{name}.md", folder / f"{name}.json"]
    for path, content in zip(paths, (text, json.dumps(body, indent=1) + "\n"), strict=True):
        path.write_text(content, encoding="utf-8")
    return paths


def _row(contender: Contender, readings: Readings, base: str, digits: int) -> str:
    found, compared = readings[contender.name], (readings, base, contender.name)
    speeds = [rate(found).text(digits), ratio(*compared).text(2), core_rate(found).text(digits), core_ratio(*compared).text(2)]
    return f"| {' | '.join([contender.name, contender.what, *speeds, _memory(found)])} |"


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
